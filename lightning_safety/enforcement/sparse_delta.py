# SPDX-License-Identifier: Apache-2.0
"""Training selected weights of a base that does not train: frozen, under adapters or not, or quantised."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, Self

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_safety.enforcement.delta_layer import DeltaLayer, delta_layers, selected_layers
from lightning_safety.enforcement.frozen import FrozenParameters, keep_in_graph
from lightning_safety.enforcement.gradients import watch_gradient
from lightning_safety.enforcement.optimizers import (
    check_elementwise,
    check_reports_steps,
    check_state_is_elementwise,
    optimized_parameters,
)
from lightning_safety.enforcement.patch import SafetyPatch
from lightning_safety.enforcement.releasable import Releasable
from lightning_safety.language.find import named_weights
from lightning_safety.language.quantized import check_quantization_supported, is_quantized_weight, keep_unpacked
from lightning_safety.scoring.mask import SafetyMask


class SparseDelta(Releasable):
    r"""Trains the weights that a mask selects in a base whose weights are frozen or quantised, and nothing else.

    From `attach` on, all that the optimizer holds are the selected weights, in float32, so that decay, momentum and
    clipping do to them what they would do in the model. Their gradient is computed without that of the whole weight.
    After every step a frozen base holds them. A layer with a quantised weight W, which cannot, computes
    :math:`y = W x + \Delta x`, with Δ their difference from W and zero elsewhere. Adapters on top stay as they are.

    Args:
        mask: The weights to train, by canonical parameter name.

    Example:
        >>> import torch
        >>> model = nn.Linear(2, 1, bias=False).requires_grad_(False)
        >>> mask = SafetyMask({"weight": torch.tensor([1])}, {"weight": (1, 2)})
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        >>> before = model.weight.clone()
        >>> delta = SparseDelta(mask).attach(model, [optimizer])
        >>> model(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
        >>> model.weight - before
        tensor([[ 0.0000, -0.5000]])
    """

    def __init__(self, mask: SafetyMask) -> None:
        self.mask = mask
        self._layers: list[DeltaLayer] = []
        self._start: dict[str, Tensor] = {}
        self._checked = False
        self._handles: list[RemovableHandle | FrozenParameters] = []

    def attach(
        self,
        model: nn.Module,
        optimizers: Iterable[Optimizer],
        *,
        trained: Mapping[str, Tensor] | None = None,
        before: Mapping[str, Tensor] | None = None,
    ) -> Self:
        """Put the selected weights into the optimizer in place of everything else.

        They go to the group that holds their layer's weight, or else to the first. Call it before a saved optimizer
        state is loaded: that state is one of the selected weights. Where a difference of an earlier training with the
        same mask acts on a quantised model, this one goes on from it.

        Args:
            model: The causal language model, or a wrapper of it, that the mask was made for.
            optimizers: The one that trains the model.
            trained: The weights to begin with, by tensor, as `entries` returns them. Default: the model's.
            before: The weights of a frozen base before any training, as `before` has them. Default: the model's.

        Raises:
            ValueError: The mask does not fit the model or selects weights of other than linear layers, these have
                adapters of a kind that is not supported, there is not one optimizer or it does not treat every weight
                by itself, or a difference with another mask acts on the model.
            TypeError: The optimizer cannot be followed step by step.
        """
        self.release()
        optimizers = list(optimizers)
        _check_optimizers(optimizers)
        self._checked = False
        of_model = {id(parameter): parameter for parameter in model.parameters()}
        self._begin(model, trained, before)
        (optimizer,) = optimizers
        others = [parameter for parameter in optimized_parameters(optimizer) if id(parameter) not in of_model]
        for parameter in [*of_model.values(), *others]:
            parameter.grad = None
        _replace_parameters(optimizer, self._layers)
        # Of these the user's code may compute a loss that no selected weight is in.
        self._handles = [
            watch_gradient(parameter, partial(setattr, parameter, "grad", None))
            for parameter in others
            if parameter.requires_grad
        ]
        self._handles += [optimizer.register_step_post_hook(self._after_step)]
        self._handles += [FrozenParameters(model, of_model.values())]
        # Reentrant checkpointing trains nothing in a block of which no input requires a gradient.
        embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
        self._handles += [module.register_forward_hook(keep_in_graph) for module in embeddings]
        return self

    def apply(self, model: nn.Module, trained: Mapping[str, Tensor]) -> Self:
        """Make the model the trained one, as it is after `settle`; nothing trains.

        Args:
            model: As for `attach`.
            trained: The selected weights, by tensor, as `entries` returns them.

        Raises:
            ValueError: As for `attach`.
        """
        self.release()
        self._begin(model, trained, None)
        self.settle()
        return self

    def _begin(
        self, model: nn.Module, trained: Mapping[str, Tensor] | None, before: Mapping[str, Tensor] | None
    ) -> None:
        self.mask.check_model(model)
        check_quantization_supported(model)
        keep_unpacked(model)
        selected = {name: indices for name, indices in self.mask.indices.items() if indices.numel()}
        found = selected_layers(model, selected)
        earlier = [acting for _, acting in delta_layers(model)]
        for acting in earlier:
            if acting.name not in selected or not acting.selects(selected[acting.name]):
                raise ValueError(
                    f"`mask` expected to be that of the difference which acts on `{acting.name}` already, from an"
                    " earlier training of this quantised model, but it selects other weights. Pass the mask of that"
                    " training to go on with it, or load the model anew."
                )
        self._start = {acting.name: acting.trained() for acting in earlier} if trained is None else dict(trained)
        layers = [
            DeltaLayer(name, found[name], selected[name], self._start.get(name), (before or {}).get(name))
            for name in selected
        ]
        for acting in earlier:
            acting.remove()
        self._layers = layers
        for layer in layers:
            layer.begin()

    @property
    def bytes(self) -> int:
        """Memory of the values and their places, in bytes; gradients and optimizer state come on top."""
        return sum(layer.bytes for layer in self._layers)

    @property
    def before(self) -> dict[str, Tensor]:
        """The selected weights before any training, by tensor: 1-D, in the weights' dtypes, on the CPU.

        Of a quantised base they are the dequantised ones.
        """
        return {layer.name: layer.before for layer in self._layers}

    @property
    def idle(self) -> list[str]:
        """The weights of layers that have not computed anything since `attach`."""
        return [layer.name for layer in self._layers if not layer.ran]

    def entries(self) -> dict[str, Tensor]:
        """Return the selected weights by name, as the optimizer has them: 1-D, float32 or wider."""
        return {layer.name: layer.trained() for layer in self._layers}

    def write(self, entries: Mapping[str, Tensor]) -> None:
        """Give the selected weights other values, in the model and in the optimizer. 1-D, by name."""
        for layer in self._layers:
            layer.write(entries[layer.name])

    def refresh(self) -> None:
        """Take the values from the model again, after something else has changed it.

        A quantised base holds none: there they stay.
        """
        for layer in self._layers:
            layer.refresh()

    def rewind(self) -> None:
        """Give the selected weights the values that they had when `attach` was called."""
        self.write(self.before | self._start)

    def patch(self, metadata: Mapping[str, str]) -> SafetyPatch:
        """Return what turns the base into the trained model.

        Of a quantised base it fits the dense model of the dequantised weights (``model.dequantize()``), in their dtype.
        """
        after = {layer.name: layer.after() for layer in self._layers}
        return SafetyPatch(self.mask, self.before, after, dict(metadata))

    def settle(self) -> None:
        """End the training: the model is the trained one, and what was frozen for it is as before.

        A frozen base holds the selected weights. On a quantised one their difference goes on acting, until `release`.
        """
        self._let_go()
        for layer in self._layers:
            layer.end()
        self._layers = [layer for layer in self._layers if layer.acts]

    def release(self) -> None:
        """End the training, and make the model what it was before it. Releasing twice does nothing."""
        self._let_go()
        for layer in self._layers:
            layer.undo()
        self._layers = []

    def _let_go(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:  # noqa: ARG002
        if not self._checked:
            for layer in self._layers:
                check_state_is_elementwise(optimizer, layer.values)
            self._checked = True
        for layer in self._layers:
            layer.write_through()


def needs_sparse_delta(model: nn.Module, mask: SafetyMask) -> bool:
    """Whether selected weights cannot be trained in place: one is quantised, or all are frozen."""
    weights = named_weights(model)
    selected = [weights[name] for name, indices in mask.indices.items() if indices.numel()]
    quantized = any(is_quantized_weight(weight) for weight in selected)
    return quantized or not any(weight.requires_grad for weight in selected)


def _check_optimizers(optimizers: list[Optimizer]) -> None:
    """Refuse, before anything is changed, what would not train the selected weights as the user expects."""
    for optimizer in optimizers:
        check_reports_steps(optimizer)
        check_elementwise(optimizer)
    # Without any, Lightning has one that holds nothing.
    count = sum(bool(optimizer.param_groups) for optimizer in optimizers)
    if count != 1 or len(optimizers) != 1:
        raise ValueError(
            f"`configure_optimizers` expected to return one optimizer where the base is frozen or quantised but returns"
            f" {count}: which one should train the selected weights is not clear. Return one for the whole model."
        )


def _replace_parameters(optimizer: Optimizer, layers: Iterable[DeltaLayer]) -> None:
    """Put the selected weights into the groups. Groups stay, even empty: schedulers count them."""
    groups = optimizer.param_groups
    holding = {id(parameter): position for position, group in enumerate(groups) for parameter in group["params"]}
    trained: list[list[DeltaLayer]] = [[] for _ in groups]
    for layer in layers:
        trained[holding.get(id(layer.layer.weight), 0)].append(layer)
    optimizer.state.clear()
    for group, members in zip(groups, trained, strict=True):
        group["params"] = [layer.values for layer in members]
        if "param_names" in group:
            group["param_names"] = [layer.name for layer in members]
