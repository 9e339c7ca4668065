# SPDX-License-Identifier: Apache-2.0
"""The value that separates the k largest of very many scores from the rest, exactly and without copying them all."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from lightning_safety.scoring.mask_indices import index_dtype

_BLOCK_ENTRIES = 2**20
SAMPLE_ENTRIES = 2**20


@dataclass(frozen=True)
class Block:
    """A run of entries of one tensor, small enough for temporary copies.

    Attributes:
        name: The tensor.
        start: Flat index of the first entry.
        values: float32 [entries]; what is selected first is largest.
        allowed: bool [entries], False where an entry may not be selected; None where all may, and none is NaN.
    """

    name: str
    start: int
    values: Tensor
    allowed: Tensor | None


@dataclass(frozen=True)
class Candidates:
    """Scores to select from.

    Attributes:
        scores: Floating-point tensors by name, at most 32 bits an entry.
        excluded: Sorted flat indices of entries that may not be selected, for some or all of the names.
        largest: Whether the largest scores come first, or the smallest.
        unscored: By name, how many of a tensor's entries are NaN: these count as if they were not there.
    """

    scores: Mapping[str, Tensor]
    excluded: Mapping[str, Tensor]
    largest: bool = True
    unscored: Mapping[str, int] = field(default_factory=dict)

    @cached_property
    def scored(self) -> int:
        """Number of entries that are not NaN, excluded ones too."""
        return sum(score.numel() for score in self.scores.values()) - sum(self.unscored.values())

    @cached_property
    def excluded_count(self) -> int:
        """Number of scored entries that may not be selected."""
        count = 0
        for name, score in self.scores.items():
            if name in self.excluded:
                index = self.excluded[name]
                count += index.numel()
                if name in self.unscored:
                    values = score.detach().reshape(-1)[index.to(score.device, torch.int64)]
                    count -= int(values.isnan().sum())
        return count

    def blocks(self) -> Iterator[Block]:
        """Yield all entries in tensor order, then flat order; those that are NaN are not allowed."""
        for name, score in self.scores.items():
            if not score.numel():
                continue
            excluded = self.excluded.get(name)
            for number, values in enumerate(torch.split(score.detach().reshape(-1), _BLOCK_ENTRIES)):
                start = number * _BLOCK_ENTRIES
                allowed = None
                if excluded is not None and excluded.numel():
                    ends = torch.tensor([start, start + values.numel()], dtype=excluded.dtype)
                    first, last = torch.searchsorted(excluded, ends).tolist()
                    allowed = torch.ones(values.shape, dtype=torch.bool, device=values.device)
                    allowed[(excluded[first:last] - start).to(values.device, torch.int64)] = False
                if name in self.unscored:
                    allowed = ~values.isnan() if allowed is None else allowed & ~values.isnan()
                yield Block(name, start, self._ordered(values), allowed)

    def sample(self, size: int) -> Tensor:
        """Return those of about `size` entries that are scored, the same on every call and device. float32 [drawn]."""
        generator = torch.Generator().manual_seed(0)
        total = self.scored + sum(self.unscored.values())
        drawn = []
        for score in self.scores.values():
            if score.numel():
                share = math.ceil(size * score.numel() / total)
                places = torch.randint(score.numel(), (share,), generator=generator)
                drawn.append(self._ordered(score.detach().reshape(-1)[places.to(score.device)]).cpu())
        values = torch.cat(drawn)
        return values[~values.isnan()] if self.unscored else values

    def _ordered(self, values: Tensor) -> Tensor:
        return values.float() if self.largest else -values.float()


@dataclass(frozen=True)
class Boundary:
    """Where a selection ends.

    Attributes:
        value: The smallest selected value.
        ties: How many of the entries that equal `value` are selected.
    """

    value: float
    ties: int


def find_boundary(candidates: Candidates, count: int) -> Boundary:
    """Return the boundary of the `count` largest values that are allowed.

    A sample gives a value that very likely lies a little below the boundary; the few entries at or above it are then
    collected, counted and searched. Where the sample misled, or ties make the few many, two exact histogram passes over
    the bits of the values take over. Either way the result is exact and no copy grows with the number of scores beyond
    an eighth of it.

    Args:
        candidates: At least `count` entries must be allowed, and `unscored` must count those that are NaN.
        count: How many to select, at least 1.
    """
    limit = candidates.scored // 8 + SAMPLE_ENTRIES
    if count <= limit:
        survivors = _survivors(candidates, _likely_lower_bound(candidates, count), limit)
        if survivors is not None and survivors.numel() >= count:
            value = survivors.topk(count, sorted=False).values.min()
            return Boundary(float(value), count - int((survivors > value).sum()))
    return histogram_boundary(lambda: _allowed(candidates), count)


def collect(candidates: Candidates, boundary: Boundary) -> dict[str, Tensor]:
    """Return by name the sorted flat indices of what lies above the boundary, and of its first ties. On the CPU."""
    found: dict[str, list[Tensor]] = {name: [] for name in candidates.scores}
    ties_left = boundary.ties
    for block in candidates.blocks():
        selected = block.values >= boundary.value
        if block.allowed is not None:
            selected &= block.allowed
        places = selected.nonzero().squeeze(1)
        if not places.numel():
            continue
        tied = block.values[places] == boundary.value
        ties = int(tied.sum())
        if ties > ties_left:
            places = places[~tied | (tied.cumsum(0) <= ties_left)]
        ties_left -= min(ties, ties_left)
        dtype = index_dtype(candidates.scores[block.name].numel())
        found[block.name].append((places + block.start).to("cpu", dtype))
    return {name: torch.cat(parts) if parts else torch.empty(0, dtype=torch.int32) for name, parts in found.items()}


def _likely_lower_bound(candidates: Candidates, count: int) -> float:
    """Return a value that at least `count` allowed entries reach, up to an error of six standard deviations."""
    if candidates.scored <= SAMPLE_ENTRIES:
        return -math.inf
    sample = candidates.sample(SAMPLE_ENTRIES)
    # Excluded entries are in the sample too, and may all lie above the boundary.
    rank = sampled_rank(sample.numel(), count + candidates.excluded_count, candidates.scored)
    return float(sample.topk(rank, sorted=False).values.min()) if rank < sample.numel() else -math.inf


def sampled_rank(drawn: int, count: int, total: int) -> int:
    """Return the rank in a sample whose value at least `count` of the `total` entries very likely reach.

    Args:
        drawn: Size of the sample.
        count: How many are to be selected, those included that may not be.
        total: Of how many the sample was drawn.
    """
    expected = drawn * count / total
    return math.ceil(expected + 6 * math.sqrt(expected) + 10)


def _survivors(candidates: Candidates, lower_bound: float, limit: int) -> Tensor | None:
    """Return the allowed values at or above `lower_bound`, float32 [survivors]; None if more than `limit`."""
    found: list[Tensor] = []
    total = 0
    for block in candidates.blocks():
        reached = block.values >= lower_bound
        if block.allowed is not None:
            reached &= block.allowed
        values = block.values[reached]
        total += values.numel()
        if total > limit:
            return None
        found.append(values.cpu())
    return torch.cat(found)


def histogram_boundary(
    values: Callable[[], Iterable[Tensor]], count: int, *, add_up: Callable[[Tensor], Tensor] = lambda counts: counts
) -> Boundary:
    """Return the boundary from two histograms: of the upper 16 bits of all values, then of the lower 16 of one bin.

    Args:
        values: Called twice, gives the values in parts; at least `count` of them.
        count: How many to select, at least 1.
        add_up: Called with a histogram, int64 [65536] on the CPU; adds those of other values to it.
    """
    bins, upper = 2**16, None
    remaining = count
    for _ in range(2):
        histogram = torch.zeros(bins, dtype=torch.int64)
        for part in values():
            keys = _ordered_bits(part)
            digits = (keys >> 16) + bins // 2 if upper is None else keys[(keys >> 16) == upper] & (bins - 1)
            histogram += torch.bincount(digits, minlength=bins).cpu()
        histogram = add_up(histogram)
        reached = histogram.flip(0).cumsum(0)
        digit = bins - 1 - int(torch.searchsorted(reached, remaining))
        remaining -= int(histogram[digit + 1 :].sum())
        if upper is None:
            upper = digit - bins // 2
    assert upper is not None
    return Boundary(_value_of_bits((upper << 16) + digit), remaining)


def _allowed(candidates: Candidates) -> Iterator[Tensor]:
    for block in candidates.blocks():
        yield block.values if block.allowed is None else block.values[block.allowed]


def _ordered_bits(values: Tensor) -> Tensor:
    """Return int32 keys in the order of the float32 `values`, equal where they are equal."""
    bits = (values + 0.0).view(torch.int32)  # −0.0 becomes 0.0.
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _value_of_bits(key: int) -> float:
    """Return the float32 value whose key `_ordered_bits` gives."""
    bits = torch.tensor([key], dtype=torch.int32)
    return float((bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32))
