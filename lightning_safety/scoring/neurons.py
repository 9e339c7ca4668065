# SPDX-License-Identifier: Apache-2.0
"""Selecting whole neurons, the rows of weights, instead of single weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lightning_safety.arguments import check_fraction
from lightning_safety.scoring.mask import SafetyMask
from lightning_safety.scoring.selection import number_to_select
from lightning_safety.scoring.shards import ShardedScores
from lightning_safety.scoring.unscored import count_unscored, write_unscored

Granularity = Literal["weight", "neuron"]


def select_neurons(
    scores: Mapping[str, Tensor],
    fraction: float,
    *,
    method: Literal["top", "bottom", "random"] = "top",
    seed: int = 0,
    metadata: Mapping[str, str] | None = None,
) -> SafetyMask:
    """Select the rows of weights whose mean score is highest, until they hold a fraction of all scored weights.

    A row is what one output neuron of a linear layer is computed by: all entries with the same first index ([out, in]),
    or the same first two of fused experts ([experts, out, in]). Coarser than `select_top`: a critical row takes its
    uncritical weights along.

    Args:
        scores: A score for each weight, by tensor name, of at least two dimensions. Rows that hold NaN were not scored.
        fraction: Fraction of all scored weights that the rows may hold together, in (0, 1]. At least one row is
            selected, and never so many that there are more weights.
        method: ``"top"``: the highest mean scores; of equal ones the one in the earlier tensor, then of the lower
            index, comes first. ``"bottom"``: the lowest, in the same order of ties. ``"random"``: rows drawn uniformly,
            the control; then scores may be on the meta device.
        seed: Of the draw.
        metadata: Kept in the mask beside method, fraction and granularity.

    Raises:
        ValueError: `fraction` is not in (0, 1], a tensor has no rows, there is nothing to select from, or `scores` are
            sharded.

    Example:
        >>> scores = {"q": torch.tensor([[0.1, 0.9], [0.4, 0.2]]), "v": torch.tensor([[0.9, 0.8], [0.0, 0.3]])}
        >>> select_neurons(scores, 0.5).indices
        {'q': tensor([0, 1], dtype=torch.int32), 'v': tensor([0, 1], dtype=torch.int32)}
    """
    check_fraction(fraction)
    if isinstance(scores, ShardedScores):
        raise ValueError(
            "`scores` expected to be of whole tensors but they are one process's parts, which hold no whole order of"
            " rows. Select single weights (`granularity='weight'`, `select_top`), or score the model on one device."
        )
    for name, score in scores.items():
        if score.dim() < 2:
            raise ValueError(f"`scores` expected to have rows but `{name}` is of shape {list(score.shape)}.")
    unscored = count_unscored(scores)
    lengths = torch.cat([_lengths(score) for score in scores.values()]) if scores else torch.empty(0)
    means = torch.cat([_means(score) for score in scores.values()]) if scores else torch.empty(0)
    total = int(lengths[~means.isnan()].sum())
    most = number_to_select(fraction, total)
    order = _ranked(means, method, seed)
    fitting = int((lengths[order].cumsum(0) <= most).sum())
    chosen = torch.zeros(means.numel(), dtype=torch.bool)
    chosen[order[: max(1, fitting)]] = True
    per_tensor = torch.split(chosen, [math.prod(score.shape[:-1]) for score in scores.values()])
    indices = {
        name: (rows.nonzero() * score.shape[-1] + torch.arange(score.shape[-1])).view(-1)
        for (name, score), rows in zip(scores.items(), per_tensor, strict=True)
    }
    shapes = {name: tuple(score.shape) for name, score in scores.items()}
    described = {"method": method, "granularity": "neuron", "fraction": str(fraction)}
    drawn = {"seed": str(seed)} if method == "random" else {}
    return SafetyMask(indices, shapes, dict(metadata or {}) | described | drawn | write_unscored(unscored, shapes))


def _lengths(score: Tensor) -> Tensor:
    return torch.full((math.prod(score.shape[:-1]),), score.shape[-1])


def _means(score: Tensor) -> Tensor:
    """Return the mean score of each row, float64, on the CPU; zeros where there are no scores."""
    if score.is_meta:
        return torch.zeros(math.prod(score.shape[:-1]), dtype=torch.float64)
    # The mean of a row in float64 would copy the tensor twice as large; the rows of one block at a time do not.
    rows = score.detach().reshape(-1, score.shape[-1])
    return torch.cat([block.double().mean(dim=1).cpu() for block in torch.split(rows, 4096)])


def _ranked(means: Tensor, method: str, seed: int) -> Tensor:
    """Return the numbers of the scored rows in the order in which they are taken."""
    scored = (~means.isnan()).nonzero().squeeze(1)
    if method == "random":
        return scored[torch.from_numpy(np.random.default_rng(seed).permutation(scored.numel()))]
    return scored[torch.argsort(means[scored], descending=method == "top", stable=True)]
