# SPDX-License-Identifier: Apache-2.0
"""Holding selected base weights still under LoRA: the adapters' product acts everywhere but there."""

from __future__ import annotations

from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_safety.enforcement.adapters import (
    AdaptedLayer,
    check_adapters_at_start,
    selected_adapted_layers,
)
from lightning_safety.enforcement.held_linear import Scratch, held_linear
from lightning_safety.enforcement.matrix_entries import MatrixEntries, add_sparse_product, entries_of_product
from lightning_safety.enforcement.releasable import Releasable
from lightning_safety.scoring.mask import SafetyMask

# The holder that acts on a layer, so that no second one takes the product out twice.
_HOLDER = "_lightning_safety_held_lora"
# From so many tokens on, copying the base weight costs less than turning activations around.
_TOKENS_WITHIN = 64


class HeldLora(Releasable):
    r"""Holds the selected base weights of LoRA layers at their values, in effect and after a merge.

    A layer with adapters computes :math:`y = W x + s\, B A \tilde x`, with x̃ the input after dropout. Freezing W holds
    nothing: the effective weight is :math:`W + s\, B A`. From `attach` on the layers compute

    .. math:: y = W x + s\, B A \tilde x - s\, (M \odot B A)\, \tilde x

    with M one at the selected weights, gradients of A, B and x included. So the effective weight is W there, whatever A
    and B become. Memory is needed for the places of the entries and for one matrix of each shape, and time for sparse
    products.

    The products stay part of the model: without them its adapters do something else. So save such a model with
    `save_held_adapter`, load it with `load_held_adapter` and merge it with `merge_held_adapter`.

    Args:
        mask: The base weights to hold, by canonical parameter name.

    Example:
        >>> import peft, torch
        >>> from tests.tiny import make_tiny_model
        >>> model = peft.get_peft_model(make_tiny_model(), peft.LoraConfig(target_modules=["v_proj"]))
        >>> name = "model.layers.0.self_attn.v_proj.weight"
        >>> mask = SafetyMask({name: torch.tensor([0, 7])}, {name: (16, 32)})
        >>> holder = HeldLora(mask).attach(model)
        >>> holder.layers
        1
        >>> elsewhere = "model.layers.0.self_attn.k_proj.weight"
        >>> HeldLora(SafetyMask({elsewhere: torch.tensor([0])}, {elsewhere: (16, 32)})).attach(model)
        Traceback (most recent call last):
        ...
        ValueError: `mask` expected to select weights of layers that have adapters but selects none there: ...
    """

    def __init__(self, mask: SafetyMask) -> None:
        self.mask = mask
        self._model: nn.Module | None = None
        self.scratch: Scratch = {}
        self._held: list[_HeldLayer] = []

    def attach(self, model: nn.Module, *, continued: bool = False) -> Self:
        """Hold from here on.

        Where a holder with an equal mask acts on the model already, this one takes its place.

        Args:
            model: A causal language model with LoRA layers inside, or a wrapper of it.
            continued: Whether the adapters were trained while the same weights were held. Otherwise they must not have
                begun to train.

        Raises:
            ValueError: The mask does not fit the model or selects nothing in layers with adapters; an adapter is of a
                kind that cannot be held, is merged, or adds something to the base already; or other weights of the
                model are held.
        """
        self.release()
        self.mask.check_model(model)
        layers = selected_adapted_layers(model, self.mask)
        check_held_by(model, self.mask)
        holders = _holders(model)
        if not continued and not holders:
            check_adapters_at_start(model, layers)
        for holder in holders:
            holder.release()
        self._model = model
        self._held = [_HeldLayer(adapted, self) for adapted in layers]
        return self

    @property
    def layers(self) -> int:
        """Number of layers that are held."""
        return len(self._held)

    @property
    def bytes(self) -> int:
        """Memory of the places of the held entries, in bytes."""
        return sum(held.entries.bytes + held.places.nbytes for held in self._held)

    def check(self) -> None:
        """Make sure that no adapter of the held layers was added, removed or merged since `attach`.

        Raises:
            RuntimeError: One was, so that weights may have moved.
        """
        if self._model is None:
            return
        present = {adapted.path: adapted.adapters for adapted in selected_adapted_layers(self._model, self.mask)}
        for held in self._held:
            before, now = held.adapters, present.pop(held.adapted.path, [])
            if before != now:
                raise RuntimeError(_changed(held.adapted.name, before, now))
        for path, adapters in present.items():
            raise RuntimeError(_changed(path, [], adapters))

    def release(self) -> None:
        """Remove every hook: the adapters act on all weights again. Releasing twice does nothing."""
        for held in self._held:
            held.release()
        self._held, self._model = [], None


def held_mask(model: nn.Module) -> SafetyMask | None:
    """Return the mask by which the adapters of `model` are held, None where they are not."""
    return next((holder.mask for holder in _holders(model)), None)


def check_held_by(model: nn.Module, mask: SafetyMask) -> None:
    """Make sure that `mask` is the one by which the adapters of `model` are held, if they are.

    Raises:
        ValueError: It is another one.
    """
    held_by = held_mask(model)
    if held_by is not None and held_by != mask:
        raise ValueError(
            f"`mask` expected to be the one that the adapters of the model are held by but it selects other weights"
            f" ({mask} instead of {held_by}). Pass that one, or merge the held adapter first (`merge_held_adapter`)."
        )


def release_holders(model: nn.Module) -> None:
    """Release whatever holds adapters of `model`."""
    for holder in _holders(model):
        holder.release()


class _HeldLayer:
    """The hooks on one layer. They sit inside of it, so that peft's scaling and dropout stay peft's."""

    def __init__(self, adapted: AdaptedLayer, holder: HeldLora) -> None:
        self.adapted = adapted
        self.adapters = adapted.adapters
        device = adapted.layer.lora_A[self.adapters[0]].weight.device
        self.places = adapted.indices.to(device)
        self.entries = MatrixEntries.from_indices(self.places, adapted.shape)
        self._base: nn.Module = adapted.layer.get_base_layer()
        self._scratch = holder.scratch
        # What to take out within the base's product, and from which input; then, that it was.
        self._within: tuple[str, Tensor] | None = None
        self._taken: str | None = None
        self._inputs: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        for adapter in self.adapters:
            self._watch(adapter, adapted.layer.lora_A[adapter], adapted.layer.lora_B[adapter])
        if type(self._base) is nn.Linear and "forward" not in vars(self._base):
            self._handles.append(adapted.layer.register_forward_pre_hook(self._choose, with_kwargs=True))
            self._base.forward = self._base_forward  # type: ignore[method-assign, assignment]
        setattr(adapted.layer, _HOLDER, holder)

    def release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._within = self._taken = None
        self._inputs.clear()
        if vars(self._base).get("forward") == self._base_forward:
            del self._base.forward
        if hasattr(self.adapted.layer, _HOLDER):
            delattr(self.adapted.layer, _HOLDER)

    def _watch(self, adapter: str, down: nn.Module, up: nn.Module) -> None:
        # Methods, not closures: a deep copy of the model gets hooks of its own.
        self._handles += [
            down.register_forward_pre_hook(partial(self._keep, adapter)),
            up.register_forward_hook(partial(self._take_out, adapter, down)),
        ]

    def _choose(self, layer: Any, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Take the product out within that of the base, if one adapter acts and on the very input of the base."""
        self._within = self._taken = None
        acting = [name for name in layer.active_adapters if name in self.adapters]
        tokens = inputs[0] if inputs else None
        if (
            isinstance(tokens, Tensor)
            and len(acting) == 1
            and not options
            and not (layer.disable_adapters or layer.merged)
            and not _drops(layer.lora_dropout[acting[0]])
            and tokens.numel() >= _TOKENS_WITHIN * self.adapted.shape[1]
            and {tokens.dtype, _weight(self._base).dtype, _weight(layer.lora_A[acting[0]]).dtype} == {torch.float32}
            and not _weight(self._base).requires_grad
            and not torch.is_autocast_enabled(tokens.device.type)
            and not torch.compiler.is_compiling()
        ):
            self._within = acting[0], tokens

    def _base_forward(self, inputs: Tensor) -> Tensor:
        if self._within is None or self._within[1] is not inputs:
            return nn.Linear.forward(self._base, inputs)  # type: ignore[arg-type]
        layer, adapter = self.adapted.layer, self._within[0]
        self._within, self._taken = None, adapter
        self.entries, self.places = self.entries.to(inputs.device), self.places.to(inputs.device)
        product = entries_of_product(_weight(layer.lora_B[adapter]), _weight(layer.lora_A[adapter]), self.entries)
        values = product * layer.scaling[adapter]
        bias: Any = self._base.bias
        return held_linear(inputs, _weight(self._base), bias, values, self.entries, self.places, self._scratch)

    def _keep(self, adapter: str, down: nn.Module, inputs: tuple[Tensor, ...]) -> None:  # noqa: ARG002
        if self._taken != adapter:
            self._inputs[adapter] = inputs[0]

    def _take_out(
        self,
        adapter: str,
        down: nn.Module,
        up: nn.Module,
        inputs: tuple[Tensor, ...],  # noqa: ARG002
        output: Tensor,
    ) -> Tensor:
        if self._taken == adapter:
            self._taken = None
            return output
        self.entries = self.entries.to(output.device)
        # peft multiplies by the scaling afterwards, so the product is taken out unscaled.
        values = entries_of_product(_weight(up), _weight(down), self.entries)
        return add_sparse_product(output, self._inputs.pop(adapter), values, self.entries, -1.0)


def _drops(dropout: nn.Module) -> bool:
    """Whether a dropout layer changes what goes through it."""
    return not isinstance(dropout, nn.Identity) and dropout.training and getattr(dropout, "p", 1.0) > 0


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def _holders(model: nn.Module) -> list[HeldLora]:
    """Return the holders that act on layers of `model`, each once."""
    found = {id(holder): holder for module in model.modules() if (holder := getattr(module, _HOLDER, None)) is not None}
    return list(found.values())


def _changed(name: str, before: list[str], now: list[str]) -> str:
    return (
        f"Adapters of `{name}` expected to stay as they were when holding began ({before or 'none'}) but are"
        f" {now or 'gone'} now: what was added acts on held weights too. Add every adapter before the fit starts, and"
        " merge after it with `merge_held_adapter`."
    )
