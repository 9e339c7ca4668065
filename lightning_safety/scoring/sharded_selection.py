# SPDX-License-Identifier: Apache-2.0
"""Selecting from scores that are spread over processes: counts travel, and what is selected; scores stay."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from lightning_safety.processes import gather, rank, sum_over_processes, world_size
from lightning_safety.scoring.boundary import (
    SAMPLE_ENTRIES,
    Boundary,
    Candidates,
    collect,
    histogram_boundary,
    sampled_rank,
)
from lightning_safety.scoring.mask_indices import index_dtype
from lightning_safety.scoring.shards import ShardedScores


def select_shards(
    scores: ShardedScores, count: int, excluded: Mapping[str, Tensor], *, largest: bool
) -> dict[str, Tensor]:
    """Return the sorted flat indices of the `count` highest or lowest scores of all processes, alike in each of them.

    They are those that one process would select from the whole tensors, ties included. Every process must call it.

    Args:
        scores: This process's parts; none may be NaN.
        count: How many; so many must be allowed.
        excluded: By name, sorted flat indices in the whole tensors that may not be selected.
        largest: Whether the highest are selected, or the lowest.
    """
    own = {name: _within(indices, scores, name) for name, indices in excluded.items() if name in scores}
    candidates = Candidates(scores, own, largest=largest)
    boundary = _find_boundary(candidates, scores.count, sum(map(len, excluded.values())), count, scores.device)
    parts = {}
    for name, ties in _shares_of_ties(candidates, boundary).items():
        alone = Candidates({name: scores[name]}, own, largest=largest)
        parts[name] = collect(alone, Boundary(boundary.value, ties))[name].long() + scores.starts[name]
    return {
        # One tensor at a time: what is selected from all of them may be large.
        name: torch.cat(gather(part)).to(index_dtype(math.prod(scores.shapes[name])))
        for name, part in parts.items()
    }


def _within(indices: Tensor, scores: ShardedScores, name: str) -> Tensor:
    """Return those of some indices into a whole tensor that lie in this process's part, counted from its start."""
    start = scores.starts[name]
    first, last = torch.searchsorted(indices, torch.tensor([start, start + scores[name].numel()])).tolist()
    return indices[first:last] - start


def _find_boundary(candidates: Candidates, total: int, excluded: int, count: int, device: torch.device) -> Boundary:
    """Return the boundary of the `count` largest allowed values of all processes."""
    drawn = candidates.sample(SAMPLE_ENTRIES // world_size() + 1) if candidates.scored else torch.empty(0)
    sample = torch.cat(gather(drawn))
    place = sampled_rank(sample.numel(), count + excluded, total)
    lower = float(sample.topk(place, sorted=False).values.min()) if place < sample.numel() else -math.inf
    if sum(gather(sum(len(values) for values in _reaching(candidates, lower)))) < count:
        lower = -math.inf

    def add_up(histogram: Tensor) -> Tensor:
        sum_over_processes([histogram], device=device)
        return histogram

    return histogram_boundary(lambda: _reaching(candidates, lower), count, add_up=add_up)


def _reaching(candidates: Candidates, lower: float) -> Iterator[Tensor]:
    """Yield the allowed values of each block that reach a bound."""
    for block in candidates.blocks():
        reached = block.values >= lower
        if block.allowed is not None:
            reached &= block.allowed
        yield block.values[reached]


def _shares_of_ties(candidates: Candidates, boundary: Boundary) -> dict[str, int]:
    """Return by tensor how many of this process's entries that equal the boundary are selected.

    Those of the earlier tensor come first; within one, those of the earlier process, whose flat indices are lower.
    """
    own = dict.fromkeys(candidates.scores, 0)
    for block in candidates.blocks():
        tied = block.values == boundary.value
        if block.allowed is not None:
            tied &= block.allowed
        own[block.name] += int(tied.sum())
    everywhere = gather(list(own.values()))
    left, shares = boundary.ties, {}
    for position, name in enumerate(own):
        for process, counts in enumerate(everywhere):
            taken = min(left, counts[position])
            left -= taken
            if process == rank():
                shares[name] = taken
    return shares
