# SPDX-License-Identifier: Apache-2.0
"""The LoRA adapters on top of the weights that a mask selects, and which kinds of them can be held."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_safety.arguments import closest
from lightning_safety.language.find import canonical_name
from lightning_safety.scoring.mask import SafetyMask

_LINEAR_KINDS = ("Linear", "Linear4bit", "Linear8bitLt")
_NAMES_SHOWN = 3


@dataclass(frozen=True)
class AdaptedLayer:
    """A linear layer with LoRA adapters, and which of its base weights are selected.

    Attributes:
        name: Canonical name of the base weight.
        path: The layer's name in the model.
        layer: The layer of peft: it holds the base layer and the adapters.
        indices: Flat indices into [out, in], sorted, whatever way around the base weight is stored; on the CPU.
        shape: (out, in).
    """

    name: str
    path: str
    layer: Any
    indices: Tensor
    shape: tuple[int, int]

    @property
    def adapters(self) -> list[str]:
        """The names of the layer's adapters, active or not."""
        return list(self.layer.lora_A)


def has_adapters(model: nn.Module) -> bool:
    """Whether a layer of `model` has adapters of peft."""
    return any(True for _ in _adapted(model))


def selected_adapted_layers(model: nn.Module, mask: SafetyMask) -> list[AdaptedLayer]:
    """Return the layers with LoRA adapters whose base weights a mask selects, in the mask's order.

    Args:
        model: A causal language model with LoRA layers inside, or a wrapper of it.
        mask: Selected base weights, by canonical name.

    Raises:
        ValueError: The mask selects nothing in any layer with adapters, so that holding it would hold nothing; or such
            a layer's adapters are of a kind that cannot be held, or are merged into the base weight.
    """
    layers = {canonical_name(f"{path}.base_layer.weight"): (path, layer) for path, layer in _adapted(model)}
    selected = {name: indices for name, indices in mask.indices.items() if indices.numel()}
    found = {name: layers[name] for name in selected if name in layers}
    if not found:
        first = next(iter(selected), "")
        raise ValueError(
            f"`mask` expected to select weights of layers that have adapters but selects none there: it selects from"
            f" {len(selected)} tensors such as `{first}`, and {len(layers)} layers have adapters."
            f" {closest(first, layers)} Nothing that trains would be held. Score with `include=` the adapted layers, or"
            " put adapters on the selected ones, for instance `target_modules='all-linear'`."
        )
    for name, (_, layer) in found.items():
        _check_kind(name, layer)
    return [
        AdaptedLayer(name, path, layer, *_laid_out(layer, selected[name], mask.shapes[name]))
        for name, (path, layer) in found.items()
    ]


def check_adapters_at_start(model: nn.Module, layers: list[AdaptedLayer]) -> None:
    """Make sure that the adapters of these layers add nothing yet: a held weight has the value of the base weight.

    Raises:
        ValueError: One does. The message names how it was initialised.
    """
    configurations = _configurations(model)
    for adapted in layers:
        for adapter in adapted.adapters:
            weights = adapted.layer.lora_A[adapter].weight, adapted.layer.lora_B[adapter].weight
            if all(bool(weight.any()) for weight in weights):
                raise _begun(adapted.name, adapter, configurations)


def adapter_rows(model: nn.Module, mask: SafetyMask) -> SafetyMask:
    """Return the rows of each B that a neuron-level mask on the base weights holds: B zero there, nothing is added.

    Args:
        model: A causal language model with LoRA layers inside.
        mask: Selects whole rows of base weights.

    Returns:
        A mask on the B of every adapter of the selected layers, by their parameter names.

    Raises:
        ValueError: `selected_adapted_layers` refuses the layers, a part of a row is selected, or B is not zero in one
            of the rows (the message names how the adapter was initialised).
    """
    indices, shapes = {}, {}
    configurations = _configurations(model)
    for adapted in selected_adapted_layers(model, mask):
        rows = _whole_rows(adapted)
        for adapter in adapted.adapters:
            weight = adapted.layer.lora_B[adapter].weight
            if bool(weight[rows.to(weight.device)].any()):
                raise _begun(adapted.name, adapter, configurations)
            name = canonical_name(f"{adapted.path}.lora_B.{adapter}.weight")
            indices[name] = (rows[:, None] * weight.shape[1] + torch.arange(weight.shape[1])).view(-1)
            shapes[name] = tuple(weight.shape)
    return SafetyMask(indices, shapes)


def _whole_rows(adapted: AdaptedLayer) -> Tensor:
    row: Tensor
    row, counts = torch.unique_consecutive(adapted.indices.long() // adapted.shape[1], return_counts=True)
    if bool((counts != adapted.shape[1]).any()):
        raise ValueError(
            "`mask` expected to select whole neurons (rows of a weight) for `granularity='neuron'` but selects parts of"
            f" {int((counts != adapted.shape[1]).sum())} rows of `{adapted.name}`. Make it with `select_neurons`, or"
            " hold single weights: `granularity='weight'`."
        )
    return row


def _begun(name: str, adapter: str, configurations: Mapping[str, Any]) -> ValueError:
    initialisation = getattr(configurations.get(adapter), "init_lora_weights", "unknown")
    return ValueError(
        f"Adapter {adapter!r} expected to add nothing to `{name}` when holding begins, but its product is not zero: it"
        f" is trained, or its initialisation (`init_lora_weights={initialisation!r}`) starts from another product and"
        " may change the base weight. Use the default `init_lora_weights=True`; continue a held adapter with"
        " `load_held_adapter`; merge a trained one into the base and begin a new one."
    )


def adapter_kind(layer: object) -> str:
    """Return what peft calls a layer with adapters, for messages: for instance ``"lora.layer.Linear"``."""
    return f"{type(layer).__module__.removeprefix('peft.tuners.')}.{type(layer).__name__}"


def _adapted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield layers that adapters of peft change, with their names; peft is looked for only where it can be."""
    for path, module in model.named_modules():
        # Every kind of adapter of peft wraps the layer that it changes under this name.
        if hasattr(module, "adapter_layer_names") and hasattr(module, "base_layer"):
            yield path, module


def _check_kind(name: str, layer: Any) -> None:
    from peft.tuners.lora import LoraLayer

    what = f"`{name}` expected to have LoRA adapters that can be held"
    advice = "Use plain LoRA (`peft.LoraConfig`), or leave this layer out of the mask or of `target_modules`."
    if not isinstance(layer, LoraLayer) or type(layer).__name__ not in _LINEAR_KINDS:
        raise ValueError(
            f"{what} but has an adapter of the kind {adapter_kind(layer)}, which is not supported. {advice}"
        )
    for adapter in layer.lora_A:
        variant = layer.lora_variant.get(adapter)
        if variant is not None:
            variant_kind = "DoRA" if layer.use_dora.get(adapter) else type(variant).__name__
            raise ValueError(
                f"{what} but adapter {adapter!r} is the LoRA variant {variant_kind}, which does more to the base weight"
                f" than to add a product to it, and is not supported. {advice}"
            )
    if layer.merged:
        raise ValueError(
            f"{what} but adapters {layer.merged_adapters} are merged into it, so that the base weight is another"
            " already. Call `unmerge_adapter()` first."
        )


def _laid_out(layer: Any, indices: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, tuple[int, int]]:
    """Return indices into [out, in] and that shape; GPT-2's layers store [in, out]."""
    first, second = shape
    if not getattr(layer, "fan_in_fan_out", False):
        return indices, (first, second)
    indices = indices.long()
    return ((indices % second) * first + indices // second).sort().values, (second, first)


def _configurations(model: nn.Module) -> Mapping[str, Any]:
    """Return peft's configurations by adapter; the model inside of a PeftModel keeps them too."""
    for module in model.modules():
        configurations = getattr(module, "peft_config", None)
        if isinstance(configurations, Mapping):
            return configurations
    return {}
