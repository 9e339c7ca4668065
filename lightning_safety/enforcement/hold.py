# SPDX-License-Identifier: Apache-2.0
"""Holding selected weights at their values, bit for bit, whatever the optimizer does."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_safety.enforcement.entries import (
    count_different_bits,
    gather_entries,
    scatter_entries,
    selected_parameters,
)
from lightning_safety.enforcement.gradients import dense_gradient, watch_gradient
from lightning_safety.enforcement.optimizers import check_reports_steps
from lightning_safety.enforcement.releasable import Releasable
from lightning_safety.processes import gather
from lightning_safety.scoring.mask import SafetyMask
from lightning_safety.scoring.shards import is_sharded, reshard


class WeightHolder(Releasable):
    """Holds the weights that a mask selects: bit-identical from `attach` until `release`.

    Two things are needed for that. The gradient of a held weight is set to zero as soon as it is accumulated, so that
    gradient clipping sees only what may move. And its value is put back after every optimizer step, because weight
    decay, momentum from earlier steps and block-wise or matrix-wise optimizers move weights whose gradient is zero.

    Args:
        mask: The weights to hold, by canonical parameter name.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> mask = SafetyMask({"weight": torch.tensor([1])}, {"weight": (1, 2)})
        >>> optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
        >>> before = model.weight.detach().clone()
        >>> with WeightHolder(mask).attach(model, [optimizer]) as holder:
        ...     model(torch.ones(1, 2)).sum().backward()
        ...     optimizer.step()
        >>> (model.weight == before).tolist()
        [[False, True]]
    """

    def __init__(self, mask: SafetyMask) -> None:
        self.mask = mask
        self._held: list[_HeldTensor] = []
        self._handles: list[RemovableHandle] = []

    def attach(self, model: torch.nn.Module, optimizers: Iterable[Optimizer]) -> Self:
        """Hold the weights of `model` at their present values through the steps of `optimizers`.

        The parameters are looked up by name here, so that a holder can be attached again after a model was wrapped,
        moved or loaded. Frozen parameters, tied ones and those in no optimizer are held as well. Quantised weights are
        left alone: no optimizer trains them. Of a model that FSDP2 shards, each process holds its own part.

        Args:
            model: The causal language model, or a wrapper of it, that the mask was made for.
            optimizers: Every optimizer that may change the model.

        Returns:
            The holder itself, so that ``with WeightHolder(mask).attach(…):`` releases it at the end.

        Raises:
            ValueError: The mask does not fit the model.
            TypeError: An optimizer cannot be followed step by step.
        """
        self.release()
        optimizers = list(optimizers)
        for optimizer in optimizers:
            check_reports_steps(optimizer)
        reshard(model)
        self._held = [
            _HeldTensor(name, parameter, indices, gather_entries(parameter, indices))
            for name, parameter, indices in selected_parameters(model, self.mask, skip_quantized=True, sharded=True)
        ]
        self._handles = [held.watch_gradient() for held in self._held]
        self._handles += [optimizer.register_step_post_hook(self._after_step) for optimizer in optimizers]
        return self

    @property
    def bytes(self) -> int:
        """Memory that holding takes, in bytes: the indices and the held values."""
        return sum(held.indices.nbytes + held.values.nbytes for held in self._held)

    def mask_gradients(self, *, only_changed: bool = False) -> None:
        """Set the gradients of held weights to zero, for instance after something was added to them.

        Args:
            only_changed: Leave alone those that have not been written to since, which is most of the time this takes.
                Writes through ``gradient.data`` are not noticed.
        """
        for held in self._held:
            held.zero_gradient(only_changed=only_changed)

    def restore(self) -> None:
        """Write the held values back."""
        for held in self._held:
            held.restore()

    def verify(self) -> int:
        """Count the held weights whose bits are not those they were held at; 0 unless something went around us.

        Where the model is sharded, every process must call this, and all get the same count.
        """
        moved = sum(held.count_moved() for held in self._held)
        return sum(gather(moved)) if is_sharded(held.parameter for held in self._held) else moved

    def release(self) -> None:
        """Remove every hook and forget the values. The weights keep them. Releasing twice does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._held = [], []

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:  # noqa: ARG002
        self.restore()


@dataclass
class _HeldTensor:
    """The held entries of one parameter: where they are (flat indices) and what they are (in the weight's dtype)."""

    name: str
    parameter: torch.nn.Parameter
    indices: Tensor
    values: Tensor
    _zeroed: tuple[int, int, int] | None = None

    def watch_gradient(self) -> RemovableHandle:
        """Set held entries to zero whenever a gradient has been accumulated."""
        # A frozen parameter takes no hook, but it may be unfrozen during the run.
        required = self.parameter.requires_grad
        self.parameter.requires_grad_(True)
        try:
            return watch_gradient(self.parameter, self.zero_gradient)
        finally:
            self.parameter.requires_grad_(required)

    def zero_gradient(self, *, only_changed: bool = False) -> None:
        gradient = dense_gradient(self.name, self.parameter)
        unchanged = only_changed and self._zeroed is not None
        if gradient is not None and not (unchanged and _state_of(gradient) == self._zeroed):
            self._follow_device()
            # By assignment: a product with a 0/1 mask would keep NaN and infinity.
            scatter_entries(gradient, self.indices, 0.0)
            self._zeroed = _state_of(gradient)

    def restore(self) -> None:
        self._follow_device()
        scatter_entries(self.parameter, self.indices, self.values)

    def count_moved(self) -> int:
        self._follow_device()
        return count_different_bits(gather_entries(self.parameter, self.indices), self.values)

    def _follow_device(self) -> None:
        """Lightning moves the model to the CPU at the end of a fit; a user may move it in between."""
        self.indices, self.values = self.indices.to(self.parameter.device), self.values.to(self.parameter.device)


def _state_of(tensor: Tensor) -> tuple[int, int, int] | None:
    """Return which tensor this is and how often it was written to, less writes through ``.data``; None if sharded."""
    return (id(tensor), tensor.data_ptr(), tensor._version) if type(tensor) is Tensor else None
