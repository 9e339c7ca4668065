# SPDX-License-Identifier: Apache-2.0
"""Merging LoRA adapters into a model whose held weights keep their bits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_safety.enforcement.adapters import adapter_kind, selected_adapted_layers
from lightning_safety.enforcement.entries import count_different_bits, gather_entries, scatter_entries
from lightning_safety.enforcement.held_lora import check_held_by, release_holders
from lightning_safety.language.find import canonical_name
from lightning_safety.language.quantized import is_quantized_weight
from lightning_safety.scoring.mask import SafetyMask

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

# Layers of peft whose merge adds `get_delta_weight` to one weight, and nothing else but a bias.
_KINDS = ("Linear", "Embedding", "ParamWrapper")


class _Adapted(NamedTuple):
    """A weight with LoRA on top: its canonical name, peft's layer, the module that holds it and its name there."""

    name: str
    layer: Any
    base: nn.Module
    parameter: str

    @property
    def weight(self) -> nn.Parameter:
        weight: nn.Parameter = getattr(self.base, self.parameter)
        return weight

    @property
    def active(self) -> list[str]:
        """The adapters that a merge adds."""
        there = {*self.layer.lora_A, *self.layer.lora_embedding_A}
        return [adapter for adapter in self.layer.active_adapters if adapter in there]


def merge_held_adapter(model: PeftModel, mask: SafetyMask) -> PreTrainedModel:
    """Add the active LoRA adapters to the weights of their model, except to the weights that `mask` selects.

    What ``merge_and_unload`` is for ordinary adapters: ``W ← where(M, W, W + s·BA)``, with M the mask. Held weights
    keep their bits; the merged model computes what the model computes with `HeldLora` attached, up to rounding. All
    else is merged as peft merges it: scaling, rank-stabilised or not, biases, several active adapters, layers that
    store their weight transposed (``fan_in_fan_out``) and ``modules_to_save``.

    A merge that is refused leaves the model as it was.

    Args:
        model: The model with its adapters, with `HeldLora` attached or not.
        mask: The weights that the training held.

    Returns:
        The base model itself, merged in place; nothing of `HeldLora` remains. `model` is not to be used any longer.

    Raises:
        TypeError: `model` is no PeftModel with adapters inside of its layers.
        ValueError: The mask does not fit the model, selects no weight with an adapter, or is not the one that the model
            is held by; an adapter is of a kind that cannot be held, merged already, or not finite; a weight with an
            adapter is quantised or shared with another layer; or a trained copy of a held weight has moved.
    """
    check_peft_model(model)
    _check_not_quantized(model)
    mask.check_model(model)
    selected_adapted_layers(model, mask)
    check_held_by(model, mask)
    adapted = list(_adapted(model))
    check_unshared(model)
    for entry in adapted:
        _check_merges(entry)
    selected = {name: indices for name, indices in mask.indices.items() if indices.numel()}
    _check_copies(model, selected)

    held = []
    for entry in adapted:
        if entry.name in selected:
            indices = selected[entry.name].to(entry.weight.device)
            held.append((entry.weight, indices, gather_entries(entry.weight, indices)))
    release_holders(model)
    merged: PreTrainedModel = model.merge_and_unload()
    for weight, indices, values in held:
        scatter_entries(weight, indices, values)
    return merged


def check_peft_model(model: Any) -> None:
    """Make sure that a model is a PeftModel with adapters inside of its layers.

    Raises:
        TypeError: It is not.
    """
    inside = hasattr(getattr(model, "base_model", None), "merge_and_unload")
    if not inside or not isinstance(getattr(model, "peft_config", None), Mapping):
        raise TypeError(
            f"`model` expected to be a PeftModel with adapters inside of its layers but got {type(model).__name__}."
            " Pass what `peft.get_peft_model` or `load_held_adapter` returned."
        )


def _adapted(model: nn.Module) -> Iterator[_Adapted]:
    """Yield every weight with an adapter.

    Raises:
        ValueError: An adapter is of a kind whose merge is more than adding a product.
    """
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    for path, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        variants = {type(variant).__name__ for variant in getattr(module, "lora_variant", {}).values()}
        if not isinstance(module, LoraLayer) or type(module).__name__ not in _KINDS or variants:
            variant = f" ({', '.join(sorted(variants))})" if variants else ""
            raise ValueError(
                f"`model` expected to have plain LoRA adapters but `{canonical_name(path)}` has one of the kind"
                f" {adapter_kind(module)}{variant}, whose merge may change held weights. Train plain LoRA where weights"
                " are held."
            )
        parameter = getattr(module, "parameter_name", "weight")
        yield _Adapted(canonical_name(f"{path}.base_layer.{parameter}"), module, module.get_base_layer(), parameter)


def _check_not_quantized(model: nn.Module) -> None:
    """Refuse quantised bases: adding to them means quantising again, and then every weight moves."""
    for name, weight in model.named_parameters():
        if is_quantized_weight(weight):
            raise ValueError(
                f"`model` expected to have an unquantised base but `{canonical_name(name)}` is quantised"
                f" ({type(weight).__name__}), where no weight would keep its value through a merge. Load the base"
                " unquantised with `load_causal_lm(…)`, put the adapter on it with `load_held_adapter`, and merge that."
            )


def check_unshared(model: nn.Module) -> None:
    """Refuse adapters on weights that another layer uses too, such as a tied output head: merging would change both.

    Raises:
        ValueError: A weight with an adapter has several names.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    names: dict[int, list[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(weight), []).append(canonical_name(name))
    for module in model.modules():
        base = module.get_base_layer().parameters() if isinstance(module, BaseTunerLayer) else ()
        for shared in (names[id(weight)] for weight in base if len(names[id(weight)]) > 1):
            raise ValueError(
                f"`model` expected to have adapters on weights of their own but `{shared[0]}` is one weight under"
                f" {len(shared)} names ({', '.join(shared)}), and a merge would change all of these layers. Load the"
                " base with `tie_word_embeddings=False`, or leave this layer out of `target_modules`."
            )


def _check_merges(entry: _Adapted) -> None:
    """Merge one weight and its bias on trial, so that nothing fails when the first layers are merged already."""
    if entry.layer.merged:
        raise ValueError(
            f"`model` expected to have unmerged adapters but {entry.layer.merged_adapters} are merged into"
            f" `{entry.name}` already. Call `unmerge_adapter()` first."
        )
    trial = entry.weight.detach().clone()
    for adapter in entry.active:
        trial += entry.layer.get_delta_weight(adapter).detach()
        biased = entry.layer.lora_bias.get(adapter, False)
        if biased and getattr(entry.base, "bias", None) is None:
            raise ValueError(
                f"`model` expected to have a bias in `{entry.name.rpartition('.')[0]}` to merge that of adapter"
                f" {adapter!r} (`lora_bias=True`) into, but it has none. Keep the adapter, or train it without."
            )
        # Through the sum: an overflow of half precision shows up here only.
        finite = bool(torch.isfinite(trial).all())
        if not finite or (biased and not bool(torch.isfinite(entry.layer.lora_B[adapter].bias).all())):
            raise ValueError(
                f"Adapter {adapter!r} expected to give finite weights but with it `{entry.name}` is not finite: it is"
                " damaged, or its training diverged. Merge an earlier checkpoint of it."
            )


def _check_copies(model: nn.Module, selected: Mapping[str, Tensor]) -> None:
    """Make sure that trained copies of whole layers (``modules_to_save``) hold the base's bits where they must."""
    from peft.utils.other import ModulesToSaveWrapper

    for path, module in model.named_modules():
        if not isinstance(module, ModulesToSaveWrapper) or not module.active_adapters:
            continue
        copies = dict(module.modules_to_save[module.active_adapters[0]].named_parameters())
        for inner, original in module.original_module.named_parameters():
            name = canonical_name(f"{path}.{inner}")
            if name not in selected:
                continue
            indices = selected[name].to(original.device)
            moved = count_different_bits(gather_entries(original, indices), gather_entries(copies[inner], indices))
            if moved:
                raise ValueError(
                    f"`mask` expected to select weights that the training held but {moved:,} of {indices.numel():,} in"
                    f" `{name}`, of which `modules_to_save` trained a copy, differ from the base. Train with"
                    " `SafetyPreservingAdaptation`, or leave this layer out of the mask."
                )
