# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_safety.scoring import SafetyMask
from lightning_safety.scoring.neurons import select_neurons


def rows_of(mask: SafetyMask, name: str) -> list[int]:
    """The rows that are selected, after making sure that each is selected whole."""
    width = mask.shapes[name][-1]
    indices = mask.indices[name].long()
    rows = torch.unique(indices // width)
    assert torch.equal(indices, (rows[:, None] * width + torch.arange(width)).view(-1))
    return rows.tolist()


@settings(max_examples=50, deadline=None)
@given(
    fraction=st.sampled_from([0.01, 0.07, 0.1, 0.25, 0.5, 0.9, 1.0]),
    method=st.sampled_from(["top", "bottom"]),
    values=st.lists(st.integers(0, 4), min_size=9, max_size=9),
)
def test_the_rows_are_the_head_of_a_stable_sort(fraction: float, method: str, values: list[int]) -> None:
    """Rows of 4 and of 2 weights, many of equal score."""
    scores = {
        "wide": torch.tensor(values[:5]).float().repeat_interleave(4).view(5, 4),
        "narrow": torch.tensor(values[5:]).float().repeat_interleave(2).view(4, 2),
    }
    mask = select_neurons(scores, fraction, method=method)
    sign = -1 if method == "top" else 1
    ranked = sorted(range(9), key=lambda row: sign * values[row])
    most, expected, held = max(1, int(fraction * 28 + 1e-9)), [], 0
    for row in ranked:
        held += 4 if row < 5 else 2
        if held > most and expected:
            break
        expected.append(row)
        if held > most:
            break
    assert sorted(expected) == rows_of(mask, "wide") + [row + 5 for row in rows_of(mask, "narrow")]
    assert mask.metadata["granularity"] == "neuron"


def test_random_rows_follow_the_seed_and_need_no_scores() -> None:
    shapes = {"a": torch.empty(200, 3, device="meta"), "b": torch.empty(4, 50, 3, device="meta")}
    first, again, other = (select_neurons(shapes, 0.25, method="random", seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert first.count == 300
    assert rows_of(first, "a")
    assert rows_of(first, "b")


def test_rows_that_were_not_scored_are_left_out() -> None:
    scores = {"a": torch.ones(4, 2)}
    scores["a"][1] = torch.nan
    mask = select_neurons(scores, 1.0)
    assert rows_of(mask, "a") == [0, 2, 3]
    assert mask.scored == 6


def test_what_has_no_rows_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected to have rows but `a` is of shape \[4\]"):
        select_neurons({"a": torch.ones(4)}, 0.5)
    with pytest.raises(ValueError, match="fraction"):
        select_neurons({"a": torch.ones(4, 2)}, 5)
