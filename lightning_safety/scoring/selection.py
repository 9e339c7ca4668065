# SPDX-License-Identifier: Apache-2.0
"""Which weights a fraction of the scores selects: the top, the bottom, or a random control."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from lightning_safety.arguments import check_fraction, closest
from lightning_safety.scoring.boundary import Candidates, collect, find_boundary
from lightning_safety.scoring.mask import SafetyMask
from lightning_safety.scoring.mask_indices import index_dtype
from lightning_safety.scoring.sharded_selection import select_shards
from lightning_safety.scoring.shards import ShardedScores
from lightning_safety.scoring.unscored import UNSCORED, Unscored, count_unscored, write_unscored

_BLOCK_ENTRIES = 2**20
_SCORE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def select_top(
    scores: Mapping[str, Tensor],
    fraction: float,
    *,
    exclude: SafetyMask | None = None,
    metadata: Mapping[str, str] | None = None,
) -> SafetyMask:
    """Select the highest scores of all tensors together.

    Exact and deterministic, the same as the head of a stable descending sort: of equal scores the one in the earlier
    tensor, then of the lower flat index, comes first. Works in blocks, so that memory grows with the selection and not
    with the scores.

    Args:
        scores: A score for each weight, by tensor name, as `expected_safety_impact` returns them. float32, bfloat16 or
            float16, any device. NaN marks what was not scored: it is as if it were not there. Every process of a group
            may give its parts, as `ShardedScores`: all get the mask that one would get from the whole tensors.
        fraction: Fraction of all scored weights to select, in (0, 1]. See `number_to_select`.
        exclude: Weights that may not be selected. They still count as scored, so that the number selected is the same.
        metadata: Kept in the mask beside the method, the fraction and how many weights of each tensor were not scored,
            for instance the objective and the model.

    Returns:
        The mask, over all tensors.

    Raises:
        TypeError: `scores` are not floating-point tensors of at most 32 bits.
        ValueError: `fraction` is not in (0, 1], there is nothing to select from, or `exclude` is of another model or
            leaves too few weights.

    Example:
        >>> scores = {"q": torch.tensor([[0.1, 0.9], [0.4, 0.2]]), "v": torch.tensor([0.9, 0.0])}
        >>> select_top(scores, 0.5).indices
        {'q': tensor([1, 2], dtype=torch.int32), 'v': tensor([0], dtype=torch.int32)}
    """
    return _select_by_score(scores, fraction, exclude, metadata, method="top")


def select_bottom(
    scores: Mapping[str, Tensor], fraction: float, *, metadata: Mapping[str, str] | None = None
) -> SafetyMask:
    """Select the lowest scores of all tensors together: a control, what the method deems least critical.

    Arguments, errors and order of ties are those of `select_top`.
    """
    return _select_by_score(scores, fraction, None, metadata, method="bottom")


def select_random(
    scores: Mapping[str, Tensor], fraction: float, seed: int, *, metadata: Mapping[str, str] | None = None
) -> SafetyMask:
    """Select weights uniformly at random, whatever their scores: the control that belongs beside every result.

    Every set of this many scored weights is equally likely. The same seed gives the same mask on every device. Memory
    grows with the selection. No global generator is touched.

    Args:
        scores: Only names, shapes and what is NaN matter; tensors on the meta device do, where nothing is.
        fraction: As for `select_top`.
        seed: Seed of the draw, at least 0.
        metadata: As for `select_top`.

    Raises:
        TypeError: `seed` is not an integer.
        ValueError: `fraction` is not in (0, 1], `seed` is negative or there is nothing to select from.
    """
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"`seed` expected to be an integer but got {seed!r}.")
    if seed < 0:
        raise ValueError(f"`seed` expected to be at least 0 but got {seed}.")
    unscored = count_unscored(scores)
    total = _count(scores, unscored)
    count = number_to_select(fraction, total)
    complement = count > total // 2
    sizes = {name: math.prod(shape) for name, shape in _shapes(scores).items()}
    drawn = _distinct(total - count if complement else count, total, np.random.default_rng(seed))
    indices = {}
    start = 0
    for name, score in scores.items():
        scored = sizes[name] - sum(unscored.get(name, {}).values())
        first, last = torch.searchsorted(drawn, torch.tensor([start, start + scored])).tolist()
        places = drawn[first:last] - start
        if complement:
            kept = torch.ones(scored, dtype=torch.bool)
            kept[places] = False
            places = kept.nonzero().squeeze(1)
        if name in unscored:
            places = _places_of_scored(score, places)
        indices[name] = places.to(index_dtype(sizes[name]))
        start += scored
    own = {"method": "random", "fraction": str(fraction), "seed": str(seed)}
    return _mask(scores, indices, metadata, own, unscored)


def number_to_select(fraction: float, total: int) -> int:
    """Return max(1, ⌊fraction · total⌋), the fraction taken as the decimal number it prints as.

    So 0.07 of 100 is 7, although the nearest binary number to 0.07 lies below it.

    Args:
        fraction: In (0, 1].
        total: Number of scored weights, at least 1.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> number_to_select(0.07, 100), int(0.29 * 100), number_to_select(0.29, 100), number_to_select(0.01, 3)
        (7, 28, 29, 1)
    """
    if total < 1:
        raise ValueError(f"`total` expected to be at least 1 scored weight but got {total}.")
    return max(1, math.floor(Fraction(repr(check_fraction(fraction))) * total))


def _select_by_score(
    scores: Mapping[str, Tensor],
    fraction: float,
    exclude: SafetyMask | None,
    metadata: Mapping[str, str] | None,
    *,
    method: str,
) -> SafetyMask:
    _check_types(scores)
    unscored = count_unscored(scores)
    total = _count(scores, unscored)
    count = number_to_select(fraction, total)
    if exclude is not None:
        _check_excluded(scores, exclude)
    excluded = {} if exclude is None else {name: exclude.indices[name] for name in exclude.indices if name in scores}
    missing = {name: sum(counts.values()) for name, counts in unscored.items()}
    candidates = Candidates(scores, excluded, largest=method == "top", unscored=missing)
    sharded = isinstance(scores, ShardedScores)
    held_back = sum(map(len, excluded.values())) if sharded else candidates.excluded_count
    available = total - held_back
    if available < count:
        raise ValueError(
            f"`exclude` expected to leave at least {count:,} of the {total:,} scored weights, the number that"
            f" `fraction={fraction}` selects, but leaves {available:,}. Lower `fraction` or exclude fewer weights."
        )
    if isinstance(scores, ShardedScores):
        indices = select_shards(scores, count, excluded, largest=method == "top")
    else:
        indices = collect(candidates, find_boundary(candidates, count))
    own = {"method": method, "fraction": str(fraction)}
    if exclude is not None:
        own["excluded"] = str(held_back)
    return _mask(scores, indices, metadata, own, unscored)


def _distinct(count: int, total: int, generator: np.random.Generator) -> Tensor:
    """Return `count` distinct integers below `total`, sorted, every such set equally likely. int64 [count].

    Drawing again for duplicates treats all integers alike, hence the uniformity; at most half of them are ever drawn,
    hence a few rounds.
    """
    drawn = torch.empty(0, dtype=torch.int64)
    while len(drawn) < count:
        # NumPy draws: its integers are free of modulo bias, whatever `total` is.
        fresh = torch.from_numpy(generator.integers(total, size=count - len(drawn)))
        drawn = torch.unique(torch.cat([drawn, fresh]))
    return drawn


def _places_of_scored(score: Tensor, ranks: Tensor) -> Tensor:
    """Return the flat indices of the scores that come at these places, sorted, among those that are not NaN."""
    found, before = [], 0
    for number, values in enumerate(torch.split(score.detach().reshape(-1), _BLOCK_ENTRIES)):
        places = (~values.isnan()).nonzero().squeeze(1).cpu() + number * _BLOCK_ENTRIES
        first, last = torch.searchsorted(ranks, torch.tensor([before, before + len(places)])).tolist()
        found.append(places[ranks[first:last] - before])
        before += len(places)
    return torch.cat(found)


def _mask(
    scores: Mapping[str, Tensor],
    indices: dict[str, Tensor],
    metadata: Mapping[str, str] | None,
    own: dict[str, str],
    unscored: Unscored,
) -> SafetyMask:
    shapes = _shapes(scores)
    given = {key: value for key, value in (metadata or {}).items() if key != UNSCORED}
    return SafetyMask(indices, shapes, {**given, **own, **write_unscored(unscored, shapes)})


def _count(scores: Mapping[str, Tensor], unscored: Unscored) -> int:
    """Return the number of scored weights, at least 1."""
    entries = sum(map(math.prod, _shapes(scores).values()))
    total = entries - sum(sum(counts.values()) for counts in unscored.values())
    if not total:
        found = "all are NaN, which marks what was not scored" if entries else "is empty"
        raise ValueError(f"`scores` expected to hold at least one weight but {found}. Score a model first.")
    return total


def _shapes(scores: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the whole tensors."""
    if isinstance(scores, ShardedScores):
        return scores.shapes
    return {name: tuple(score.shape) for name, score in scores.items()}


def _check_types(scores: Mapping[str, Tensor]) -> None:
    for name, score in scores.items():
        if score.dtype not in _SCORE_DTYPES:
            raise TypeError(
                f"`scores` expected to be float32, bfloat16 or float16 but `{name}` is {score.dtype}."
                " Convert it with `.float()`."
            )


def _check_excluded(scores: Mapping[str, Tensor], exclude: SafetyMask) -> None:
    """Refuse a mask of another model: same names but other shapes, or no name in common."""
    shapes = _shapes(scores)
    shared = [name for name in exclude.shapes if name in shapes]
    if not shared:
        first = next(iter(exclude.shapes), "")
        raise ValueError(
            f"`exclude` expected to be a mask over the scored tensors but shares none with them: it has `{first}`."
            f" {closest(first, scores)}"
        )
    for name in shared:
        if exclude.shapes[name] != shapes[name]:
            raise ValueError(
                f"`exclude` expected to have the shapes of the scores but `{name}` is {list(exclude.shapes[name])} in"
                f" the mask and {list(shapes[name])} in the scores. Pass a mask made from the same model."
            )
