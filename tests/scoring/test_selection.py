# SPDX-License-Identifier: Apache-2.0
"""Selection equals a stable sort, whatever the scores; the random control is uniform; bad input is refused."""

from __future__ import annotations

import json
import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hypothesis_numpy
from torch import Tensor

from lightning_safety.scoring import boundary as boundary_module
from lightning_safety.scoring import selection as selection_module
from lightning_safety.scoring.mask import SafetyMask
from lightning_safety.scoring.selection import number_to_select, select_bottom, select_random, select_top

DENORMAL = 1e-45


def stable_sort(
    scores: dict[str, Tensor], fraction: float, *, largest: bool, exclude: SafetyMask | None = None
) -> dict[str, list[int]]:
    """Return what a stable sort of every score that is not NaN selects: the reference."""
    entries = [
        (name, place, value)
        for name, score in scores.items()
        for place, value in enumerate(score.double().flatten().tolist())
        if not math.isnan(value)
    ]
    count = max(1, math.floor(Fraction(str(fraction)) * len(entries)))
    if exclude is not None:
        banned = {(name, place) for name, index in exclude.indices.items() for place in index.tolist()}
        entries = [entry for entry in entries if entry[:2] not in banned]
    entries.sort(key=lambda entry: -entry[2] if largest else entry[2])
    chosen: dict[str, list[int]] = {name: [] for name in scores}
    for name, place, _ in entries[:count]:
        chosen[name].append(place)
    return {name: sorted(places) for name, places in chosen.items()}


def as_lists(mask: SafetyMask) -> dict[str, list[int]]:
    return {name: index.tolist() for name, index in mask.indices.items()}


@pytest.fixture(params=["direct", "sampled", "misled", "histogram"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Take each way to the boundary on small inputs, in several blocks."""
    monkeypatch.setattr(boundary_module, "_BLOCK_ENTRIES", 97)
    if request.param != "direct":
        monkeypatch.setattr(boundary_module, "SAMPLE_ENTRIES", 16)
    if request.param == "misled":
        monkeypatch.setattr(boundary_module, "_likely_lower_bound", lambda candidates, count: math.inf)
    if request.param == "histogram":
        monkeypatch.setattr(boundary_module, "_survivors", lambda *arguments: None)
    return str(request.param)


def cases() -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    normal = torch.randn(40, 30, generator=generator)
    zero_heavy = torch.where(torch.rand(50, 20, generator=generator) < 0.97, 0.0, normal.flatten()[:1000].view(50, 20))
    denormal = torch.randint(0, 9, (300,), generator=generator) * DENORMAL
    return {
        "random": {"a": normal.abs(), "b": torch.rand(17, generator=generator), "c": torch.rand(3, 4, 5)},
        "signed": {"a": normal, "b": -normal.abs()[:3]},
        "tied": {"a": (normal * 2).round(), "b": (normal * 2).round()[:, :7]},
        "all equal": {"a": torch.ones(13), "b": torch.ones(4, 4)},
        "zero-heavy": {"a": zero_heavy.abs(), "b": torch.zeros(60)},
        "signed zeros": {"a": torch.tensor([0.0, -0.0, 0.0, -0.0] * 9), "b": torch.tensor([-0.0, 0.0])},
        "denormal": {"a": denormal, "b": -denormal},
        "infinite": {"a": torch.tensor([math.inf, 1.0, -math.inf, math.inf, 0.0] * 8)},
        "single tensor": {"only": torch.rand(1000, generator=generator)},
        "single entry": {"only": torch.tensor([0.5])},
        "with an empty tensor": {"none": torch.empty(0, 3), "some": torch.rand(9)},
        "transposed": {"a": normal.t(), "b": normal},
        "bfloat16": {"a": normal.bfloat16()},
        "not all scored": {
            "a": torch.where(normal < 0, math.nan, normal),
            "b": torch.full((4, 3), math.nan),
            "c": torch.cat([torch.full((1, 20, 20), math.nan), torch.rand(2, 20, 20, generator=generator)]),
        },
    }


@pytest.mark.parametrize("fraction", [0.001, 0.07, 0.5, 1.0])
@pytest.mark.parametrize("case", cases())
def test_equals_a_stable_sort(case: str, fraction: float, path: str) -> None:
    scores = cases()[case]
    assert as_lists(select_top(scores, fraction)) == stable_sort(scores, fraction, largest=True)
    assert as_lists(select_bottom(scores, fraction)) == stable_sort(scores, fraction, largest=False)


numbers = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=True, allow_subnormal=True),
    st.sampled_from([0.0, -0.0, 1.0, DENORMAL, 2 * DENORMAL, -DENORMAL, math.nan]),
)
score_sets = st.lists(
    hypothesis_numpy.arrays(np.float32, st.integers(1, 30), elements=numbers), min_size=1, max_size=4
).map(lambda arrays: {f"tensor{number}": torch.from_numpy(array) for number, array in enumerate(arrays)})


@settings(max_examples=100, deadline=None)
@given(scores=score_sets, fraction=st.floats(1e-3, 1.0), data=st.data())
def test_equals_a_stable_sort_on_anything(scores: dict[str, Tensor], fraction: float, data: st.DataObject) -> None:
    total = sum(int((~score.isnan()).sum()) for score in scores.values())
    assume(total)
    excluded = {
        name: torch.tensor(sorted(data.draw(st.sets(st.integers(0, score.numel() - 1)))), dtype=torch.int64)
        for name, score in scores.items()
    }
    exclude = SafetyMask(excluded, {name: tuple(score.shape) for name, score in scores.items()})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(boundary_module, "_BLOCK_ENTRIES", data.draw(st.sampled_from([8, 2**20])))
        patch.setattr(boundary_module, "SAMPLE_ENTRIES", data.draw(st.sampled_from([8, 2**20])))
        assert as_lists(select_top(scores, fraction)) == stable_sort(scores, fraction, largest=True)
        assert as_lists(select_bottom(scores, fraction)) == stable_sort(scores, fraction, largest=False)
        available = sum(int((~score.isnan()).sum()) - int((~score[excluded[name]].isnan()).sum())
                        for name, score in scores.items())  # fmt: skip
        if available < number_to_select(fraction, total):
            with pytest.raises(ValueError, match="`exclude` expected to leave at least"):
                select_top(scores, fraction, exclude=exclude)
        else:
            chosen = select_top(scores, fraction, exclude=exclude)
            assert as_lists(chosen) == stable_sort(scores, fraction, largest=True, exclude=exclude)


@pytest.mark.parametrize("unscored", [0, 900_000])
def test_millions_of_scores_take_the_sampled_path(unscored: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = {"a": torch.rand(1500, 1000, generator=generator), "b": torch.rand(700_001, generator=generator)}
    scores["c"] = torch.full((unscored,), math.nan)
    monkeypatch.setattr(boundary_module, "histogram_boundary", lambda *_: pytest.fail("the sample was not enough"))
    mask = select_top(scores, 0.01)
    together = torch.cat([scores["a"].flatten(), scores["b"]])
    expected = together.sort(descending=True, stable=True).indices[: mask.count].sort().values
    chosen = torch.cat([mask.indices["a"].long(), mask.indices["b"].long() + 1_500_000])
    assert torch.equal(chosen, expected)


def test_excluded_weights_still_count_as_scored() -> None:
    scores = {"a": torch.arange(100.0)}
    best = select_top(scores, 0.05)
    others = select_top(scores, 0.05, exclude=best, metadata={"model": "tiny", "method": "mine"})
    assert others.indices["a"].tolist() == [90, 91, 92, 93, 94]
    assert others.metadata == {"model": "tiny", "method": "top", "fraction": "0.05", "excluded": "5"}
    assert others.scored == 100


def test_exclude_may_cover_other_tensors_too() -> None:
    whole = SafetyMask({"a": torch.tensor([3]), "z": torch.tensor([0])}, {"a": (4,), "z": (1,)})
    chosen = select_top({"a": torch.arange(4.0)}, 0.25, exclude=whole)
    assert chosen.indices["a"].tolist() == [2]


def test_the_number_is_exact_for_every_decimal() -> None:
    for total in (10, 100, 1000, 12345, 10**9 + 7):
        for thousandths in range(1, 1001):
            expected = max(1, thousandths * total // 1000)
            assert number_to_select(thousandths / 1000, total) == expected
    assert number_to_select(1e-5, 10**6) == 10
    assert number_to_select(1, 7) == 7


@pytest.mark.parametrize("fraction", [0, 5, -0.1, math.nan, math.inf, 1.0001])
def test_a_fraction_out_of_range_is_refused(fraction: float) -> None:
    for select in (select_top, select_bottom, lambda scores, fraction: select_random(scores, fraction, 0)):
        with pytest.raises(ValueError, match=r"`fraction` expected to be in \(0, 1\]"):
            select({"a": torch.ones(4)}, fraction)


def test_what_was_not_scored_counts_as_if_it_were_not_there() -> None:
    nothing = torch.full((2, 5), math.nan)
    scores = {
        "experts": torch.stack([torch.full((2, 5), 9.0), nothing, torch.ones(2, 5)]),
        "whole": nothing,
        "some": torch.tensor([3.0, math.nan, 4.0, 5.0]),
    }
    for mask in (select_top(scores, 0.5), select_bottom(scores, 0.5), select_random(scores, 0.5, 1)):
        assert (mask.scored, mask.count, mask.fraction, mask.unscored_count) == (23, 11, 11 / 23, 21)
        assert json.loads(mask.metadata["unscored"]) == {"experts": {"1": 10}, "whole": 10, "some": 1}
        assert "of 23 weights" in repr(mask)
        assert "21 unscored" in repr(mask)
    assert as_lists(select_top(scores, 0.5)) == {"experts": list(range(10)), "whole": [], "some": [3]}
    with pytest.raises(ValueError, match=r"`exclude` expected to leave at least 13 of the 23 scored"):
        select_top(scores, 0.6, exclude=select_top(scores, 0.5))


def test_counts_of_unscored_weights_are_not_taken_from_elsewhere() -> None:
    before = select_top({"a": torch.tensor([1.0, math.nan])}, 1.0)
    assert "unscored" not in select_top({"a": torch.ones(2)}, 1.0, metadata=before.metadata).metadata


@pytest.mark.parametrize("scores", [{}, {"a": torch.empty(0)}, {"a": torch.tensor([math.nan])}])
def test_nothing_to_select_from_is_refused(scores: dict[str, Tensor]) -> None:
    for select in (select_top, select_bottom, lambda scores, fraction: select_random(scores, fraction, 0)):
        with pytest.raises(ValueError, match="at least one weight"):
            select(scores, 0.5)


@pytest.mark.parametrize("score", [torch.ones(2, dtype=torch.float64), torch.ones(2, dtype=torch.int32)])
def test_other_types_of_score_are_refused(score: Tensor) -> None:
    with pytest.raises(TypeError, match="`a` is"):
        select_top({"a": score}, 0.5)


def test_an_exclude_mask_of_another_model_is_refused() -> None:
    scores = {"layers.0.q": torch.ones(4)}
    elsewhere = SafetyMask({"layers.0.k": torch.tensor([0])}, {"layers.0.k": (4,)})
    with pytest.raises(ValueError, match=r"shares none with them.*Did you mean `layers.0.q`"):
        select_top(scores, 0.5, exclude=elsewhere)
    other_shape = SafetyMask({"layers.0.q": torch.tensor([0])}, {"layers.0.q": (2, 4)})
    with pytest.raises(ValueError, match=r"\[2, 4\] in the mask and \[4\] in the scores"):
        select_top(scores, 0.5, exclude=other_shape)


@pytest.mark.parametrize("fraction", [0.001, 0.01, 0.3, 0.5, 0.51, 0.97, 1.0])
def test_random_selects_exactly_the_number(fraction: float) -> None:
    scores = {"a": torch.rand(30, 40), "b": torch.rand(1), "c": torch.rand(555)}
    mask = select_random(scores, fraction, seed=5)
    assert mask.count == number_to_select(fraction, 1756)
    assert mask == select_random({name: torch.zeros_like(score) for name, score in scores.items()}, fraction, seed=5)
    assert mask.metadata == {"method": "random", "fraction": str(fraction), "seed": "5"}
    if fraction < 1:
        assert mask != select_random(scores, fraction, seed=6)


def test_random_needs_shapes_only() -> None:
    shapes = {"a": torch.empty(30, 40, device="meta"), "b": torch.empty(7, dtype=torch.float64)}
    assert select_random(shapes, 0.1, seed=5).count == 120


def test_random_leaves_global_generators_alone() -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    expected = torch.rand(3), np.random.rand(3)
    torch.manual_seed(1)
    np.random.seed(1)
    select_random({"a": torch.rand(0, 3), "b": torch.ones(50)}, 0.5, seed=0)
    select_top({"b": torch.ones(50)}, 0.5)
    assert torch.equal(torch.rand(3), expected[0])
    assert np.array_equal(np.random.rand(3), expected[1])


@pytest.mark.parametrize("fraction", [0.4, 0.6])
@pytest.mark.parametrize("unscored", [False, True])
def test_random_is_uniform_over_sets(unscored: bool, fraction: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection_module, "_BLOCK_ENTRIES", 2)
    scores = {"a": torch.zeros(2), "b": torch.zeros(3)}
    if unscored:
        scores = {"a": torch.tensor([math.nan, 0.0, math.nan, 0.0]), "b": torch.tensor([0.0, 0.0, 0.0, math.nan])}
    draws = 4000
    seen = Counter(
        tuple(
            (name, place)
            for name, places in as_lists(select_random(scores, fraction, seed)).items()
            for place in places
        )
        for seed in range(draws)
    )
    sets = math.comb(5, number_to_select(fraction, 5))
    assert len(seen) == sets
    assert not any(scores[name][place].isnan() for drawn in seen for name, place in drawn)
    chi_squared = sum((count - draws / sets) ** 2 / (draws / sets) for count in seen.values())
    assert chi_squared < 28  # 9 degrees of freedom, p = 0.001.


@pytest.mark.parametrize(("seed", "error"), [(-1, ValueError), (1.5, TypeError), (True, TypeError), (None, TypeError)])
def test_a_bad_seed_is_refused(seed: object, error: type[Exception]) -> None:
    with pytest.raises(error, match="`seed` expected"):
        select_random({"a": torch.ones(4)}, 0.5, seed)  # type: ignore[arg-type]
