# SPDX-License-Identifier: Apache-2.0
"""Which expert a weight belongs to, and experts that no token reached."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_safety.scoring.mixture import Mixture, prefixes


class ExpertPlace(NamedTuple):
    """Where the experts of a tensor are.

    Attributes:
        module: Name of the module that holds the experts.
        expert: The expert's own name; None where they are fused, and the first dimension counts them.
    """

    module: str
    expert: str | None


def expert_place(name: str, shape: Sequence[int], patterns: Sequence[str] | None = None) -> ExpertPlace | None:
    """Return where the experts of a tensor are, read from its name and shape; None for what is no expert's.

    Args:
        name: The tensor's name.
        shape: Its shape; three dimensions mean fused experts.
        patterns: Of the modules that hold experts, as in `MixtureLayout`. Default: those called ``experts``.

    Example:
        >>> expert_place("layers.0.mlp.experts.down_proj", (4, 2, 2))
        ExpertPlace(module='layers.0.mlp.experts', expert=None)
        >>> expert_place("layers.0.mlp.experts.7.w1.weight", (2, 2))
        ExpertPlace(module='layers.0.mlp.experts', expert='7')
        >>> expert_place("layers.0.mlp.up_proj.weight", (2, 2))
    """

    def holds(module: str) -> bool:
        if patterns is None:
            return module.rpartition(".")[2] == "experts"
        return any(fnmatch.fnmatchcase(module, pattern) for pattern in patterns)

    place = _place(name, shape, holds)
    if place is None and patterns is None and len(shape) == 3:
        return ExpertPlace(name.removesuffix(".weight").rpartition(".")[0], None)
    return place


def _place(name: str, shape: Sequence[int], holds: Callable[[str], bool]) -> ExpertPlace | None:
    *modules, _ = prefixes(name)
    module = next((module for module in modules if holds(module)), None)
    if module is None:
        return None
    if len(shape) == 3:
        return ExpertPlace(module, None)
    expert, _, rest = name.removeprefix(f"{module}.").partition(".")
    return ExpertPlace(module, expert) if rest else None


def find_reached(gradients: Mapping[str, Tensor], mixture: Mixture, reached: dict[tuple[str, str], bool]) -> None:
    """Note which experts some token reached: those with a gradient that is not zero in one of their tensors.

    An expert whose tokens the objective does not depend on (a prompt's, in the last layer) counts as not reached.

    Args:
        gradients: Summed over all examples, by canonical name; of all tensors or of some.
        mixture: The model's experts.
        reached: By module and expert; what is found is added.
    """
    for name, gradient in gradients.items():
        parts = _expert_parts(name, gradient, mixture)
        for key, part in parts.items():
            # A question to the device for each: only where the answer is not known.
            reached[key] = reached.get(key, False) or bool(part.any())


def unscore_unreached(scores: Mapping[str, Tensor], mixture: Mixture, reached: Mapping[tuple[str, str], bool]) -> None:
    """Set the scores of experts that no token reached to NaN, in place: nothing is known of them.

    Args:
        scores: Of all tensors, by canonical name.
        mixture: The model's experts.
        reached: What `find_reached` found in the gradients of all tensors.
    """
    for name, score in scores.items():
        for key, part in _expert_parts(name, score, mixture).items():
            if not reached[key]:
                part.fill_(math.nan)


def _expert_parts(name: str, tensor: Tensor, mixture: Mixture) -> dict[tuple[str, str], Tensor]:
    """Return the parts of a tensor that belong to experts, by module and expert; none where it is no expert's."""
    place = _place(name, tensor.shape, mixture.experts.__contains__)
    if place is None:
        return {}
    if place.expert is not None:
        return {(place.module, place.expert): tensor}
    names = mixture.experts[place.module]
    return {(place.module, expert): part for expert, part in zip(names, tensor, strict=True)}


def selected_by_expert(indices: Tensor, shape: Sequence[int]) -> list[int]:
    """Return how many of the flat indices into fused experts [experts, …, …] lie in each.

    Example:
        >>> selected_by_expert(torch.tensor([0, 3, 9]), (3, 2, 2))
        [2, 0, 1]
    """
    places = torch.div(indices.long(), math.prod(shape[1:]), rounding_mode="floor")
    found: list[int] = torch.bincount(places, minlength=shape[0]).tolist()
    return found
