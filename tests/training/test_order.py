# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import random
from collections import Counter
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_safety.training import BatchOrder


def random_lengths(number: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(10, 300, number).tolist()


@pytest.mark.parametrize(("rows", "batch_size"), [(1, 4), (4, 4), (80, 4), (83, 4), (7, 1)])
def test_without_shares_an_epoch_holds_every_row_once(rows: int, batch_size: int) -> None:
    order = BatchOrder([random_lengths(rows)], batch_size)
    for epoch in range(3):
        batches = order.batches(epoch)
        assert len(batches) == len(order) == -(-rows // batch_size)
        assert sorted(index for batch in batches for index in batch) == list(range(rows))
        assert sorted(map(len, batches)) == [rows % batch_size or batch_size] + [batch_size] * (len(order) - 1)


def test_order_depends_on_seed_and_epoch_alone() -> None:
    lengths = [random_lengths(90)]
    order = BatchOrder(lengths, 4, seed=3)
    expected = [order.batches(epoch) for epoch in range(3)]
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    again = BatchOrder(lengths, 4, seed=3)
    assert [again.batches(epoch) for epoch in (2, 0, 1)] == [expected[2], expected[0], expected[1]]
    assert expected[0] != expected[1] != expected[2]
    assert BatchOrder(lengths, 4, seed=4).batches(0) != expected[0]


def test_global_random_generators_are_not_touched() -> None:
    before = (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate())
    BatchOrder([random_lengths(90)], 4).batches(0)
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()
    assert before[2] == random.getstate()


def test_rows_meet_others_in_other_epochs() -> None:
    order = BatchOrder([random_lengths(80)], 4)
    together = [{frozenset(batch) for batch in order.batches(epoch)} for epoch in range(4)]
    assert not set.intersection(*together)
    assert sum(len(a & b) for a, b in pairwise(together)) <= 3


def padding(order: list[list[int]], lengths: list[int]) -> float:
    cells = sum(max(lengths[index] for index in batch) * len(batch) for batch in order)
    return 1 - sum(lengths[index] for batch in order for index in batch) / cells


@pytest.mark.parametrize("shares", [None, [0.5, 0.5]])
def test_less_padding_than_in_random_batches(shares: list[float] | None) -> None:
    sources = [random_lengths(500, seed=1), random_lengths(500, seed=2)]
    lengths = sources[0] + sources[1]
    shuffled = np.random.default_rng(0).permutation(1000).reshape(-1, 8).tolist()
    ordered = BatchOrder(sources, 8, shares=shares).batches(0)
    assert padding(ordered, lengths) < 0.5 * padding(shuffled, lengths)


def test_short_batches_are_not_first() -> None:
    """The order of batches is random, not by length."""
    lengths = list(range(1, 801))
    order = BatchOrder([lengths], 4)
    firsts = [max(order.batches(epoch)[0]) for epoch in range(40)]
    assert min(firsts) < 200
    assert max(firsts) > 600


@pytest.mark.parametrize(
    ("shares", "batch_size", "expected"),
    [([0.5, 0.3, 0.2], 10, (5, 3, 2)), ([0.5, 0.25, 0.25], 4, (2, 1, 1)), ([0.5, 0.5], 2, (1, 1))],
)
def test_whole_shares_are_exact_in_every_batch(shares: list[float], batch_size: int, expected: tuple[int, ...]) -> None:
    sizes = (80, 40, 60)[: len(shares)]
    order = BatchOrder([random_lengths(size, seed=size) for size in sizes], batch_size, shares=shares)
    ends = np.cumsum(sizes)
    for epoch in range(2):
        for batch in order.batches(epoch):
            assert tuple(np.bincount(np.searchsorted(ends, batch, side="right"), minlength=len(sizes))) == expected


@given(
    shares=st.lists(st.integers(1, 50), min_size=1, max_size=5),
    batch_size=st.integers(1, 9),
    rows=st.integers(1, 40),
)
@settings(max_examples=60, deadline=None)
def test_uneven_shares_are_rounded_and_their_sums_stay_right(shares: list[int], batch_size: int, rows: int) -> None:
    exact = [Fraction(share, sum(shares)) for share in shares]
    order = BatchOrder([[5] * rows for _ in shares], batch_size, shares=[float(share) for share in exact])
    counts = np.array([np.bincount(np.array(batch) // rows, minlength=len(shares)) for batch in order.batches(0)])
    quotas = np.array([float(share * batch_size) for share in exact])
    assert (counts.sum(axis=1) == batch_size).all()
    assert (counts >= np.floor(quotas - 1e-4)).all()
    assert (counts <= np.ceil(quotas + 1e-4)).all()
    # The rounding of one batch is made up for in the next.
    assert (np.abs(counts.sum(axis=0) - quotas * len(counts)) < 1.5).all()


def test_every_row_of_a_source_comes_before_any_comes_again() -> None:
    sizes = (30, 7)
    order = BatchOrder([[5] * size for size in sizes], 4, shares=[0.75, 0.25])
    seen = [index for epoch in range(20) for batch in order.batches(epoch) for index in batch]
    for start, end in ((0, 30), (30, 37)):
        times = Counter(index for index in seen if start <= index < end)
        assert len(times) == end - start
        assert max(times.values()) - min(times.values()) <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lengths": [], "batch_size": 2}, "at least one row"),
        ({"lengths": [[1], []], "batch_size": 2}, "at least one row"),
        ({"lengths": [[1]], "batch_size": 0}, "`batch_size` expected to be at least 1"),
        ({"lengths": [[1]], "batch_size": 2, "seed": -1}, "`seed` expected to be an integer of at least 0"),
        ({"lengths": [[1]], "batch_size": 2, "shares": [0.5, 0.5]}, "`shares` expected"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BatchOrder(**arguments)


@pytest.mark.parametrize("total", [8, 9, 10, 11, 12])
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_out_the_batches_of_one(total: int, processes: int) -> None:
    lengths = [[7 * row % 5 + 1 for row in range(total)]]
    whole = [batch for batch in BatchOrder(lengths, 4, seed=2).batches(1) if len(batch) >= processes]
    parts = [
        BatchOrder(lengths, 4 // processes, seed=2, processes=processes, process=rank) for rank in range(processes)
    ]
    assert {len(part) for part in parts} == {len(whole)}
    for number, batch in enumerate(whole):
        shares = [part.batches(1)[number] for part in parts]
        assert sorted(row for share in shares for row in share) == sorted(batch)
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        assert min(map(len, shares)) >= 1


def test_shares_hold_in_the_batches_of_all_processes() -> None:
    parts = [BatchOrder([[1] * 8, [1] * 24], 2, shares=[0.25, 0.75], processes=2, process=rank) for rank in (0, 1)]
    for batches in zip(*(part.batches(0) for part in parts), strict=True):
        assert sum(row < 8 for batch in batches for row in batch) == 1
