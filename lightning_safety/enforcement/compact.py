# SPDX-License-Identifier: Apache-2.0
"""Training selected weights only, with an optimizer that holds nothing but them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_safety.enforcement.compact_tensor import TrainedTensor
from lightning_safety.enforcement.entries import scatter_entries, selected_parameters
from lightning_safety.enforcement.frozen import FrozenParameters
from lightning_safety.enforcement.gradients import watch_gradient
from lightning_safety.enforcement.optimizers import (
    check_elementwise,
    check_reports_steps,
    check_state_is_elementwise,
    optimized_parameters,
)
from lightning_safety.enforcement.releasable import Releasable
from lightning_safety.enforcement.replicas import GradientAverage
from lightning_safety.processes import gather, rank
from lightning_safety.scoring.mask import SafetyMask
from lightning_safety.scoring.shards import gather_parts, is_sharded, local_span, reshard

_NAMES_SHOWN = 5


class CompactTraining(Releasable):
    """Trains the weights that a mask selects; everything else stays bit-identical.

    From `attach` on, the optimizers hold one 1-D parameter per tensor with selected entries in place of the model's
    parameters, in the same groups, so that learning rates, decay, schedules and flags stay as they were. A backward
    pass hands each of them the selected entries of its tensor's gradient and frees the rest at once; after a step the
    values are written into the model. So gradients, optimizer state, clipping and scaling cover selected weights only.
    Parameters of the model without selected entries are frozen until `release`.

    Of a model that FSDP2 shards, every process trains the entries that it holds, with the same number of 1-D
    parameters, sharded as the model's are: a norm over their gradients is that of all. Whoever saves an optimizer's
    state by the names of the model's parameters does not find them: `optimizer_state` does.

    Args:
        mask: The weights to train, by canonical parameter name.
        replicated: Whether each process trains a copy of the model on data of its own (DDP): the gradients of selected
            weights are averaged over processes, and nothing else needs to be.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> mask = SafetyMask({"weight": torch.tensor([1])}, {"weight": (1, 2)})
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> before = model.weight.detach().clone()
        >>> with CompactTraining(mask).attach(model, [optimizer]):
        ...     model(torch.ones(1, 2)).sum().backward()
        ...     optimizer.step()
        >>> (model.weight == before).tolist()
        [[True, False]]
    """

    def __init__(self, mask: SafetyMask, *, replicated: bool = False) -> None:
        self.mask = mask
        self.replicated = replicated
        self._trained: list[TrainedTensor] = []
        self._handles: list[RemovableHandle | FrozenParameters] = []
        self._unchecked: set[Optimizer] = set()

    def attach(self, model: torch.nn.Module, optimizers: Iterable[Optimizer]) -> Self:
        """Put the selected entries into `optimizers` in place of the parameters of `model`.

        Call it before a saved optimizer state is loaded: that state is one of the selected entries.

        Args:
            model: The causal language model, or a wrapper of it, that the mask was made for.
            optimizers: Those that train the model. State that they hold already is carried over.

        Returns:
            The object itself, so that ``with CompactTraining(mask).attach(…):`` releases it at the end.

        Raises:
            ValueError: The mask does not fit the model, a selected weight is frozen or in no optimizer, an optimizer
                holds no selected weight, or it is one that does not treat every weight by itself.
            TypeError: An optimizer cannot be followed step by step.
        """
        self.release()
        optimizers = list(optimizers)
        reshard(model)
        trained = _trained_tensors(model, self.mask)
        _check_trainable(trained, optimizers)
        by_parameter = {id(tensor.parameter): tensor for tensor in trained}
        of_model = {id(parameter): parameter for parameter in model.parameters()}
        unselected = [parameter for key, parameter in of_model.items() if key not in by_parameter]
        others = {
            id(p): p for optimizer in optimizers for p in optimized_parameters(optimizer) if id(p) not in of_model
        }
        for optimizer in optimizers:
            _replace_parameters(optimizer, by_parameter)
        self._trained, self._unchecked = trained, set(optimizers)
        for tensor in trained:
            tensor.take_gradient()
        for parameter in [*unselected, *others.values()]:
            parameter.grad = None
        if self.replicated:
            _average_gradients(trained)
        self._handles = [tensor.watch_gradient() for tensor in trained]
        # Of these the user's code may compute a loss that no selected weight is in.
        freed = list(others.values())
        if is_sharded(of_model.values()):
            # FSDP2 has made up its mind which weights get a gradient.
            freed += unselected
        else:
            self._handles.append(FrozenParameters(model, unselected))
        self._handles += [
            watch_gradient(parameter, partial(setattr, parameter, "grad", None))
            for parameter in freed
            if parameter.requires_grad
        ]
        self._handles += [optimizer.register_step_post_hook(self._after_step) for optimizer in optimizers]
        return self

    @property
    def bytes(self) -> int:
        """Memory of the indices and the compact parameters, in bytes; gradients and optimizer state come on top."""
        return sum(tensor.bytes for tensor in self._trained)

    def refresh(self) -> None:
        """Take the values from the model again, after something else has changed it."""
        for tensor in self._trained:
            tensor.refresh()

    def entries(self) -> dict[str, Tensor]:
        """Return the selected entries by name, as the optimizers have them: 1-D, in the weights' dtypes.

        Of a sharded model, those that this process holds.
        """
        return {tensor.name: tensor.entries for tensor in self._trained}

    def write(self, entries: Mapping[str, Tensor]) -> None:
        """Give the selected entries other values, in the model and in the optimizers. 1-D, by name, as of `entries`."""
        for tensor in self._trained:
            scatter_entries(tensor.parameter, tensor.indices, entries[tensor.name].to(tensor.parameter.dtype))
        self.refresh()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the state of an optimizer, that of all processes, in the first of them. All must call it.

        Returns:
            As ``optimizer.state_dict()``, with one value for each selected entry, on the CPU in the order of the mask.
            In other processes nothing, so that a machine holds it once.
        """
        state = optimizer.state_dict()
        whole: dict[int, dict[str, Any]] = {}
        for position, tensor in enumerate(self._in_order(optimizer)):
            found = {
                # One tensor at a time, in every process.
                key: gather_parts(tensor.cut(value), tensor.parameter) if _is_like(value, tensor.compact) else value
                for key, value in state["state"].get(position, {}).items()
            }
            if rank() == 0:
                whole[position] = found
        return {"state": whole, "param_groups": state["param_groups"]} if rank() == 0 else {}

    def load_optimizer_state(self, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
        """Give an optimizer what `optimizer_state` returned, in as many processes or another number."""
        own: dict[int, dict[str, Any]] = {}
        for position, tensor in enumerate(self._in_order(optimizer)):
            indices = self.mask.indices[tensor.name]
            span = local_span(indices, tensor.parameter)
            own[position] = {
                key: tensor.fill_up(value[span].to(tensor.indices.device)) if _is_like(value, indices) else value
                for key, value in state["state"].get(position, {}).items()
            }
        optimizer.load_state_dict({"state": own, "param_groups": list(state["param_groups"])})

    def _in_order(self, optimizer: Optimizer) -> list[TrainedTensor]:
        """Return what an optimizer trains, as it numbers its parameters."""
        by_compact = {id(tensor.compact): tensor for tensor in self._trained}
        found = [by_compact.get(id(parameter)) for parameter in optimized_parameters(optimizer)]
        known = [tensor for tensor in found if tensor is not None]
        if len(known) < len(found):
            raise ValueError(
                f"`optimizer` expected to hold selected weights alone but {len(found) - len(known)} other parameters"
                " were added during the fit. Under a strategy that shards the model, let its groups be as they are."
            )
        return known

    def release(self) -> None:
        """Remove every hook; the model holds the trained values. Releasing twice does nothing.

        The optimizers keep the compact parameters: a checkpoint saved after the fit needs them, and Lightning makes
        new optimizers for the next one.
        """
        for handle in self._handles:
            handle.remove()
        self._handles, self._trained = [], []

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:  # noqa: ARG002
        if optimizer in self._unchecked:
            for parameter in optimized_parameters(optimizer):
                check_state_is_elementwise(optimizer, parameter)
            self._unchecked.remove(optimizer)
        for tensor in self._trained:
            tensor.write_back()


def _trained_tensors(model: torch.nn.Module, mask: SafetyMask) -> list[TrainedTensor]:
    selected = selected_parameters(model, mask, sharded=True)
    counts = [indices.numel() for _, _, indices in selected]
    if is_sharded(parameter for _, parameter, _ in selected):
        counts = [max(of_one) for of_one in zip(*gather(counts), strict=True)]
    return [TrainedTensor(*tensor, longest) for tensor, longest in zip(selected, counts, strict=True)]


def _is_like(value: object, entries: Tensor) -> bool:
    """Whether this part of an optimizer's state has one value for each of some entries."""
    return isinstance(value, Tensor) and value.shape == entries.shape


def _average_gradients(trained: list[TrainedTensor]) -> None:
    """Let what a backward pass gives be averaged over processes before it counts."""

    def receive(position: int, mean: Tensor) -> None:
        trained[position].add_gradient(mean)

    average = GradientAverage([tensor.compact for tensor in trained], receive)
    for position, tensor in enumerate(trained):
        tensor.hand_on = partial(average.add, position)


def _check_trainable(trained: list[TrainedTensor], optimizers: list[Optimizer]) -> None:
    """Refuse, before anything is changed, what would not train the selected weights as the user expects."""
    for optimizer in optimizers:
        check_reports_steps(optimizer)
        check_elementwise(optimizer)
    frozen = [tensor.name for tensor in trained if not tensor.parameter.requires_grad]
    if frozen:
        raise ValueError(
            f"`mask` expected to select trainable weights but {_listed(frozen)} frozen (`requires_grad=False`)."
            " Unfreeze them, or score with `exclude=` so that none of their weights is selected."
        )
    held = [{id(parameter) for parameter in optimized_parameters(optimizer)} for optimizer in optimizers]
    absent = [tensor.name for tensor in trained if not any(id(tensor.parameter) in ids for ids in held)]
    if absent:
        raise ValueError(
            f"`mask` expected to select weights that an optimizer trains but {_listed(absent)} in none."
            " Pass all parameters of the model to the optimizer, and build a new optimizer in every"
            " `configure_optimizers`."
        )
    selected = {id(tensor.parameter) for tensor in trained}
    for position, (optimizer, ids) in enumerate(zip(optimizers, held, strict=True)):
        if not ids & selected:
            raise ValueError(
                f"Optimizer {position} ({type(optimizer).__name__}) expected to hold selected weights but it holds"
                " none, and only selected weights may change. Leave it out, or select some of its weights."
            )


def _replace_parameters(optimizer: Optimizer, by_parameter: dict[int, TrainedTensor]) -> None:
    """Put compact parameters into the groups of `optimizer`. Groups stay, even empty: schedulers count them."""
    for group in optimizer.param_groups:
        trained = [by_parameter[id(parameter)] for parameter in group["params"] if id(parameter) in by_parameter]
        for parameter in group["params"]:
            state = optimizer.state.pop(parameter, None)
            if state and id(parameter) in by_parameter:
                tensor = by_parameter[id(parameter)]
                optimizer.state[tensor.compact] = tensor.compact_state(state)
        group["params"] = [tensor.compact for tensor in trained]
        if "param_names" in group:
            group["param_names"] = [tensor.name for tensor in trained]


def _listed(names: list[str]) -> str:
    """Return up to five names and the verb that follows them."""
    shown = ", ".join(f"`{name}`" for name in names[:_NAMES_SHOWN])
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return f"{shown}{more} {'is' if len(names) == 1 else 'are'}"
