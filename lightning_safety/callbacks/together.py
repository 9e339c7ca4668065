# SPDX-License-Identifier: Apache-2.0
"""What callbacks that hold or train selected weights mean for each other and for the model as a whole."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import pytorch_lightning as pl
from torch import nn

from lightning_safety.enforcement.adapters import has_adapters
from lightning_safety.language import canonical_name, count_weights, is_quantized_weight, named_weights
from lightning_safety.scoring.mask import union_of_masks

if TYPE_CHECKING:
    from lightning_safety.callbacks.selected import SelectedWeightsCallback


def check_together(callbacks: Sequence[SelectedWeightsCallback]) -> None:
    """Refuse two callbacks that train nothing but their own weights, and a weight that one holds and another trains."""
    training = [callback for callback in callbacks if callback.trains]
    if len(training) > 1:
        raise ValueError(
            f"`callbacks` expected to hold one {type(training[0]).__name__} but there are {len(training)}, and each"
            " trains nothing but its own weights. Pass one with the union of the masks: `mask=first | second`."
        )
    for trains in training:
        for holds in callbacks:
            if holds is trains or trains.mask is None or holds.mask is None:
                continue
            overlap = trains.mask.overlap(holds.mask)
            if overlap:
                raise ValueError(
                    f"`mask` expected to select other weights in {type(trains).__name__} and {type(holds).__name__} but"
                    f" {overlap:,} are in both: they cannot be trained and held still. Take them out of one,"
                    " for instance `mask=trained - held`."
                )


def averaging_callback(trainer: pl.Trainer) -> str | None:
    """Return the name of a callback that replaces the weights by a mean of earlier ones, None where there is none."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        # By name: the classes of the two Lightning packages differ.
        if {kind.__name__ for kind in type(callback).__mro__} & {"WeightAveraging", "StochasticWeightAveraging"}:
            return type(callback).__name__
    return None


def check_no_adapters(model: nn.Module, names: Collection[str], argument: str) -> None:
    """Refuse adapters on top of weights: they change what the weights do while the weights stand still.

    Args:
        model: The causal language model.
        names: Canonical names of the weights that must have none.
        argument: Whose value these are, for the message.

    Raises:
        ValueError: One has an adapter.
    """
    for name, _ in model.named_parameters():
        canonical = canonical_name(name)
        if ".base_layer." in name and canonical in names:
            raise ValueError(
                f"`{argument}` expected to select weights without adapters but `{canonical}` has one (LoRA or alike),"
                " whose update is not in the weight. Train without adapters, or leave these layers out."
            )


def check_not_quantized(weights: Mapping[str, nn.Parameter], argument: str) -> None:
    """Refuse weights that bitsandbytes quantised: their values are packed, and nothing trains them.

    Args:
        weights: By canonical name.
        argument: Whose value these are, for the message.

    Raises:
        ValueError: One is quantised.
    """
    name = next((name for name, weight in weights.items() if is_quantized_weight(weight)), None)
    if name is not None:
        raise ValueError(
            f"`{argument}` expected to select weights that can move but `{name}` is quantised and stands still."
            " Load the model unquantised, or leave quantised layers out."
        )


def held_fraction(callbacks: Sequence[SelectedWeightsCallback], model: nn.Module) -> float:
    """Return the fraction of the model's weights that cannot move, all callbacks together."""
    total = number_of_weights(model)
    for callback in callbacks:
        if callback.trains and callback.mask is not None:
            return 1 - callback.mask.count / total
    masks = [callback.mask for callback in callbacks if callback.mask is not None]
    return union_of_masks(masks).count / total


def number_of_weights(model: nn.Module) -> int:
    """Return the number of weights of a model, tied ones once."""
    return count_weights(named_weights(model).values())


def check_can_change(trainer: pl.Trainer, callbacks: Sequence[SelectedWeightsCallback], model: nn.Module) -> None:
    """Refuse to choose anew where what is held cannot be let go."""
    if has_adapters(model):
        raise ValueError(
            "`rescore_every_n_steps` expected a model without adapters but it has some (LoRA or alike): their effective"
            " weights can be held only from where the adapters add nothing, the start of a fit. Leave it out."
        )
    if any(callback.trains for callback in callbacks):
        raise ValueError(
            "`rescore_every_n_steps` expected no SafetyEnhancementTuning beside it but there is one, and a weight that"
            " it trains might come to be held. Leave one of the two out."
        )
    averaging = averaging_callback(trainer)
    if averaging is not None:
        raise ValueError(
            f"`rescore_every_n_steps` expected the weights to stay as trained but {averaging} replaces them by a mean,"
            " in which held weights have values from before they were held. Leave one of the two out."
        )
