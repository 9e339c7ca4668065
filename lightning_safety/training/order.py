# SPDX-License-Identifier: Apache-2.0
"""Which rows make up which batch: a function of seed and epoch alone, so that a fit can be resumed anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from lightning_safety.arguments import check_positive

# Rows are sorted by length only within so many batches: enough to save most padding, and the order stays random.
_POOL_BATCHES = 16
# A small set is still cut into this many pools; one pool would make the same batches in every epoch.
_FEWEST_POOLS = 4


class BatchOrder:
    """The batches of every epoch, as indices of rows.

    Rows of similar length meet in a batch (they are sorted by length within random pools), and the batches come in
    random order. Nothing is drawn from a global random generator.

    Without `shares`, an epoch holds every row once, and only one batch may be short. With `shares`, every batch is full
    and holds each source's share of it, rounded up or down so that the sums over batches stay right; an epoch is as
    many batches as all rows would fill. Each source is then walked through in its own endless shuffled order: no row
    comes a second time before every row of that source came once, across epochs too.

    Several processes share out every batch: a step of theirs trains on the rows of one process whose batches are so
    many times as large, each on rows of about the same lengths. A batch of fewer rows than processes is left out.

    Args:
        lengths: For each source, the length of each of its rows, in tokens.
        batch_size: Rows in a batch of one process.
        seed: Another seed, another order.
        shares: For each source, its share of every batch; they sum to 1. None: all rows are alike.
        processes: How many share out the batches.
        process: The number of this one, from 0.

    Raises:
        ValueError: There is no row, a source is empty, `shares` does not fit the sources, or there are fewer rows than
            processes.

    Example:
        >>> order = BatchOrder([[7, 5], [6, 9, 8]], batch_size=2, shares=[0.5, 0.5])
        >>> [sorted(index < 2 for index in batch) for batch in order.batches(epoch=0)]
        [[False, True], [False, True], [False, True]]
        >>> order.batches(epoch=1) == order.batches(epoch=1)
        True
    """

    def __init__(
        self,
        lengths: Sequence[Sequence[int]],
        batch_size: int,
        *,
        seed: int = 0,
        shares: Sequence[float] | None = None,
        processes: int = 1,
        process: int = 0,
    ) -> None:
        batch_size = check_positive(batch_size, "batch_size") * processes
        self._processes, self._process = processes, process
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise ValueError(f"`seed` expected to be an integer of at least 0 but got {seed!r}.")
        if not lengths or not all(len(source) for source in lengths):
            raise ValueError(f"`lengths` expected to hold at least one row for each source but got {lengths!r}.")
        self._lengths = np.concatenate([np.asarray(source, dtype=np.int64) for source in lengths])
        self._seed = seed
        total = len(self._lengths)
        if shares is None:
            self._sizes = [total]
            self._counts = _plain_counts(total, batch_size)
        else:
            if len(shares) != len(lengths) or not all(share > 0 for share in shares):
                raise ValueError(f"`shares` expected to hold a positive number for each source but got {shares!r}.")
            self._sizes = [len(source) for source in lengths]
            self._counts = _stratified_counts(shares, batch_size, -(-total // batch_size))
        if not len(self):
            raise ValueError(
                f"`train` expected a row for each of {processes} processes but has {total}. Use fewer, or more rows."
            )

    def __len__(self) -> int:
        """Return the number of batches of an epoch."""
        return int((self._counts.sum(axis=1) >= self._processes).sum())

    def batches(self, epoch: int) -> list[list[int]]:
        """Return this process's batches of one epoch.

        Args:
            epoch: From 0.

        Returns:
            For each batch the indices of its rows, counted through all sources one after another.
        """
        batches: list[list[int]] = [[] for _ in self._counts]
        first = 0
        for source, size in enumerate(self._sizes):
            self._deal(batches, self._draw(source, epoch) + first, self._counts[:, source])
            first += size
        # A fixed last word in each seed keeps the streams of sources and of batches apart.
        order = np.random.default_rng([self._seed, epoch, 0, 1]).permutation(len(batches))
        whole = [batches[index] for index in order if len(batches[index]) >= self._processes]
        return [batch[self._process :: self._processes] for batch in whole]

    def _draw(self, source: int, epoch: int) -> NDArray[np.int64]:
        """Return the rows of `source` that `epoch` uses, in random order."""
        size, needed = self._sizes[source], int(self._counts[:, source].sum())
        start, drawn = epoch * needed, []
        while needed:
            cycle, offset = divmod(start, size)
            shuffled = np.random.default_rng([self._seed, cycle, source, 0]).permutation(size)
            drawn.append(shuffled[offset : offset + needed])
            start, needed = start + len(drawn[-1]), needed - len(drawn[-1])
        return np.concatenate(drawn) if drawn else np.empty(0, dtype=np.int64)

    def _deal(self, batches: list[list[int]], rows: NDArray[np.int64], counts: NDArray[np.int64]) -> None:
        """Deal `rows` out to the batches, sorted by length within each pool of batches."""
        pool = min(_POOL_BATCHES, max(1, len(batches) // _FEWEST_POOLS))
        dealt = 0
        for start in range(0, len(batches), pool):
            pooled = rows[dealt : dealt + int(counts[start : start + pool].sum())]
            pooled = pooled[np.argsort(self._lengths[pooled], kind="stable")]
            dealt += len(pooled)
            ends = np.cumsum(counts[start : start + pool])
            for batch, part in zip(batches[start : start + pool], np.split(pooled, ends[:-1]), strict=True):
                batch.extend(part.tolist())


def _plain_counts(total: int, batch_size: int) -> NDArray[np.int64]:
    """Return the rows in each batch [batches, 1] of one source seen once; the last batch takes what is left."""
    starts = np.arange(0, total, batch_size, dtype=np.int64)
    return np.minimum(batch_size, total - starts)[:, None]


def _stratified_counts(shares: Sequence[float], batch_size: int, batches: int) -> NDArray[np.int64]:
    """Return how many rows each batch takes from each source [batches, sources].

    Every count is its quota rounded up or down, every batch is full, and what rounding gives too little in one batch
    comes first in the next. In fractions: 0.3 · 10 as a float is not 3.
    """
    exact = [Fraction(share).limit_denominator(1_000_000) for share in shares]
    quotas = [share / sum(exact) * batch_size for share in exact]
    floors = [int(quota) for quota in quotas]
    uneven = [source for source, quota in enumerate(quotas) if quota != int(quota)]
    given = [0] * len(quotas)
    counts = np.empty((batches, len(quotas)), dtype=np.int64)
    for batch in range(batches):
        row = list(floors)
        due = {source: (batch + 1) * quotas[source] - given[source] - floors[source] for source in uneven}
        for source in sorted(uneven, key=lambda index: (-due[index], index))[: batch_size - sum(floors)]:
            row[source] += 1
        given = [before + now for before, now in zip(given, row, strict=True)]
        counts[batch] = row
    return counts
