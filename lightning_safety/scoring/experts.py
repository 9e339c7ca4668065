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


def unscore_unreached(scores: Mapping[str, Tensor], mixture: Mixture) -> None:
    """Set the scores of experts that no token reached to NaN, in place: nothing is known of them.

    They are the experts whose gradient is exactly zero in all of their tensors. An expert whose tokens the objective
    does not depend on (a prompt's, in the last layer) counts as not reached too.

    Args:
        scores: Gradients summed over all examples, by canonical name.
        mixture: The model's experts.
    """
    reached: dict[tuple[str, str], bool] = {}
    parts: list[tuple[tuple[str, str], Tensor]] = []
    for name, score in scores.items():
        place = _place(name, score.shape, mixture.experts.__contains__)
        if place is None:
            continue
        if place.expert is None:
            found = list(zip(mixture.experts[place.module], score, strict=True))
            moved = score.flatten(1).any(dim=1).tolist()
        else:
            found, moved = [(place.expert, score)], [bool(score.any())]
        for (expert, part), some in zip(found, moved, strict=True):
            key = (place.module, expert)
            reached[key] = reached.get(key, False) or some
            parts.append((key, part))
    for key, part in parts:
        if not reached[key]:
            part.fill_(math.nan)


def selected_by_expert(indices: Tensor, shape: Sequence[int]) -> list[int]:
    """Return how many of the flat indices into fused experts [experts, …, …] lie in each.

    Example:
        >>> selected_by_expert(torch.tensor([0, 3, 9]), (3, 2, 2))
        [2, 0, 1]
    """
    places = torch.div(indices.long(), math.prod(shape[1:]), rounding_mode="floor")
    found: list[int] = torch.bincount(places, minlength=shape[0]).tolist()
    return found
