# SPDX-License-Identifier: Apache-2.0
"""What callbacks did to the base under adapters: which of its weights were held, and which trained instead of them.

A checkpoint of adapters holds no base, so it must say so itself, whichever callbacks there are when it is loaded.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from lightning_safety.enforcement import HeldLora, SparseDelta
from lightning_safety.enforcement.delta_layer import delta_layers
from lightning_safety.enforcement.entries import gather_entries
from lightning_safety.enforcement.held_lora import held_mask
from lightning_safety.language import canonical_name
from lightning_safety.language.quantized import is_quantized_weight
from lightning_safety.scoring import SafetyMask
from lightning_safety.scoring.mask import union_of_masks

if TYPE_CHECKING:
    import pytorch_lightning as pl

_OF_MODEL = "model"


def describe_interventions(
    trainer: pl.Trainer | None, model: nn.Module, left_out: Collection[str], states: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what `restore_interventions` and `held_weights` need.

    Args:
        trainer: Whose callbacks hold or train weights. None: no trainer.
        model: The model with adapters.
        left_out: The names of the base weights that the checkpoint does not hold, canonical.
        states: The states of callbacks that the checkpoint holds. A mask among them is not written twice.

    Returns:
        ``held``: by what (the key of a callback's state), ``granularity``, and ``mask`` if it is in no such state.
        ``trained``: for each `SafetyEnhancementTuning` of weights that are left out its ``mask``, and the values
        ``entries``. Tensors and primitives.
    """
    from lightning_safety.callbacks import SafetyEnhancementTuning, SafetyPreservingAdaptation

    callbacks: list[Any] = [] if trainer is None else trainer.callbacks  # type: ignore[attr-defined]
    held: dict[str, Any] = {}
    trained: list[dict[str, Any]] = []
    masks = []
    for callback in callbacks:
        if isinstance(callback, SafetyPreservingAdaptation) and callback.mask is not None:
            masks.append(callback.mask)
            held[callback.state_key] = {"granularity": callback.choice.granularity}
            if not states.get(callback.state_key):
                held[callback.state_key]["mask"] = callback.mask.state_dict()
        elif isinstance(callback, SafetyEnhancementTuning) and callback.mask is not None:
            trained += _trained(model, callback.mask, left_out)
    acting = held_mask(model)
    if acting is not None and acting not in masks:
        held[_OF_MODEL] = {"granularity": "weight", "mask": acting.state_dict()}
    return {"held": held, "trained": trained}


def restore_interventions(model: nn.Module, described: Mapping[str, Any], states: Mapping[str, Any]) -> None:
    """Make a model with adapters compute what it computed when it was described.

    Args:
        model: The model with adapters of the same kind.
        described: What `describe_interventions` returned.
        states: The states of callbacks beside it in the checkpoint.

    Raises:
        ValueError: A mask does not fit the model, or other weights of the model are held already.
    """
    restore_trained(model, described)
    mask = held_weights(described, states, acting_only=True)
    acting = held_mask(model)
    if mask is not None:
        HeldLora(mask).attach(model, continued=True)
    elif acting is not None:
        raise ValueError(
            f"`checkpoint` expected to be one of a fit that held the same weights as the model does ({acting}) but its"
            " fit held none. Load it into a new module."
        )


def restore_trained(model: nn.Module, described: Mapping[str, Any]) -> None:
    """Give base weights that trained in the place of adapters their values, in a dense base or beside a quantised one.

    Raises:
        ValueError: A mask does not fit the model.
    """
    for trained in described["trained"]:
        mask, entries = SafetyMask.from_state_dict(trained["mask"]), trained["entries"]
        acting = {layer.name: layer for _, layer in delta_layers(model)}
        if all(name in acting and acting[name].selects(mask.indices[name]) for name in entries):
            # They are training right now: a learning rate finder puts back what it found.
            for name, values in entries.items():
                acting[name].write(values)
        else:
            SparseDelta(mask).apply(model, entries)


def held_weights(
    described: Mapping[str, Any], states: Mapping[str, Any], *, acting_only: bool = False
) -> SafetyMask | None:
    """Return the base weights that were held; None if there were none.

    Args:
        described: What `describe_interventions` returned.
        states: The states of callbacks beside it in the checkpoint.
        acting_only: Leave out neurons: their rows of the adapter stand still, so that it holds them by itself.
    """
    masks = []
    for key, held in described["held"].items():
        if not (acting_only and held["granularity"] == "neuron"):
            masks.append(SafetyMask.from_state_dict(held["mask"] if "mask" in held else states[key]["mask"]))
    if len(masks) < 2:
        return masks[0] if masks else None
    return union_of_masks(masks)


def _trained(model: nn.Module, mask: SafetyMask, left_out: Collection[str]) -> list[dict[str, Any]]:
    weights = {canonical_name(name): weight for name, weight in model.named_parameters()}
    beside = {acting.name: acting.trained() for _, acting in delta_layers(model)}
    # Beside a quantised weight nothing acts before something has trained.
    selected = {
        name: indices
        for name, indices in mask.indices.items()
        if indices.numel() and name in left_out and (name in beside or not is_quantized_weight(weights[name]))
    }
    if not selected:
        return []
    entries = {
        name: beside[name] if name in beside else gather_entries(weights[name], indices.to(weights[name].device))
        for name, indices in selected.items()
    }
    return [{"mask": mask.state_dict(), "entries": {name: values.cpu() for name, values in entries.items()}}]
