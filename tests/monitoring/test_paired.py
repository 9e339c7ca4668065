# SPDX-License-Identifier: Apache-2.0
"""The exact paired test: its level by enumeration, its values by brute force; and what repeating it costs."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.stats import multinomial, norm

from lightning_safety.monitoring import (
    OutcomeChange,
    RepeatedComparison,
    compare_outcomes,
    paired_increase_p_value,
    smallest_detectable_increase,
)
from lightning_safety.monitoring.paired import _statistic, smallest_number_of_pairs
from lightning_safety.monitoring.repeated import Comparison

MARGINS = (0.0, 0.01, 0.1, 0.4)


@cache
def tables(pairs: int) -> list[tuple[int, int]]:
    return [(newly, no_longer) for newly in range(pairs + 1) for no_longer in range(pairs + 1 - newly)]


def probabilities(pairs: int, newly: float, no_longer: float) -> np.ndarray:
    counts = [(one, other, pairs - one - other) for one, other in tables(pairs)]
    # Rounding may leave a little less than nothing for the rest.
    return np.asarray(multinomial.pmf(counts, pairs, [newly, no_longer, max(0.0, 1 - newly - no_longer)]))


def plain_statistic(newly: int, no_longer: int, pairs: int, margin: float) -> float:
    """Tango's statistic with the likeliest share found by search instead of by his formula."""

    def misfit(share: float) -> float:
        parts = [(newly, share + margin), (no_longer, share), (pairs - newly - no_longer, 1 - 2 * share - margin)]
        return -sum(count * math.log(max(chance, 1e-300)) for count, chance in parts if count)

    end = (1 - margin) / 2
    found = minimize_scalar(misfit, bounds=(0, end), method="bounded", options={"xatol": 1e-12}).x
    share = min((0.0, end, found), key=misfit)
    variance = pairs * (2 * share + margin * (1 - margin))
    return (newly - no_longer - pairs * margin) / math.sqrt(variance) if variance else 0.0


@pytest.mark.parametrize("margin", MARGINS)
@pytest.mark.parametrize("pairs", [1, 3, 6])
def test_agrees_with_brute_force(pairs: int, margin: float) -> None:
    statistics = np.array([plain_statistic(*table, pairs, margin) for table in tables(pairs)])
    shares = np.linspace(0, (1 - margin) / 2, 1000)
    chances = np.array([probabilities(pairs, share + margin, share) for share in shares])
    for table, statistic in zip(tables(pairs), statistics, strict=True):
        expected = chances[:, statistics >= statistic - 1e-5].sum(axis=1).max()
        assert paired_increase_p_value(*table, pairs, margin) == pytest.approx(expected, abs=2e-6), table


@pytest.mark.parametrize("margin", MARGINS)
@pytest.mark.parametrize("pairs", [5, 12, 20])
def test_errs_no_more_often_than_it_says(pairs: int, margin: float) -> None:
    p_values = np.array([paired_increase_p_value(*table, pairs, margin) for table in tables(pairs)])
    random = np.random.default_rng(0)
    for alpha in (0.005, 0.05, 0.2):
        sizes = []
        for _ in range(60):
            no_longer = random.uniform(0, (1 - margin) / 2)
            # At the margin, and where the increase is less than is tolerated.
            for newly in (no_longer + margin, random.uniform(0, no_longer + margin)):
                sizes.append(probabilities(pairs, newly, no_longer)[p_values <= alpha].sum())
        assert max(sizes) <= alpha + 1e-9
        # And it is not a test that never rejects.
        assert not (p_values <= alpha).any() or max(sizes) > 0


@pytest.mark.parametrize("margin", [0.0, 0.003, 0.05, 0.3, 0.9])
@pytest.mark.parametrize("pairs", [1, 4, 37, 120])
def test_the_statistic_rises_with_new_ones_and_falls_with_others(pairs: int, margin: float) -> None:
    """Then the tail is an interval for each row, and the null hypothesis is worst at the margin."""
    newly, no_longer = np.meshgrid(np.arange(pairs + 1), np.arange(pairs + 1), indexing="ij")
    values = np.where(newly + no_longer <= pairs, _statistic(newly, no_longer, pairs, margin), np.nan)
    for axis, sign in ((0, 1), (1, -1)):
        steps = sign * np.diff(values, axis=axis)
        assert np.all(steps[~np.isnan(steps)] >= -1e-9)


def test_without_a_margin_it_is_mcnemars() -> None:
    values = _statistic(np.array([9, 3, 0, 5]), np.array([1, 7, 0, 0]), 30, 0.0)
    assert values == pytest.approx([8 / math.sqrt(10), -4 / math.sqrt(10), 0, math.sqrt(5)])
    assert paired_increase_p_value(0, 0, 30, 0.0) == 1
    assert paired_increase_p_value(4, 4, 30, 0.0) == 1


def test_p_values_fall_with_the_increase() -> None:
    falling = [paired_increase_p_value(newly, 2, 50, 0.01) for newly in range(0, 49, 3)]
    assert falling == sorted(falling, reverse=True)
    rising = [paired_increase_p_value(9, no_longer, 50, 0.01) for no_longer in range(0, 40, 3)]
    assert rising == sorted(rising)
    margins = [paired_increase_p_value(9, 1, 50, margin) for margin in (0, 0.01, 0.05, 0.1, 0.3)]
    assert margins == sorted(margins)


def test_many_prompts() -> None:
    # By then the normal approximation is close, at the likeliest share; the test takes the worst one.
    approximation = norm.sf(plain_statistic(230, 180, 1000, 0.01))
    assert approximation < paired_increase_p_value(230, 180, 1000, 0.01) < 1.5 * approximation
    assert paired_increase_p_value(0, 0, 0, 0.01) == 1


@pytest.mark.parametrize(("pairs", "alpha"), [(8, 0.005), (20, 0.05), (40, 0.01), (300, 0.005)])
def test_smallest_increase_is_the_smallest(pairs: int, alpha: float) -> None:
    smallest = smallest_detectable_increase(pairs, 0.01, alpha)
    assert smallest is not None
    newly = round(smallest * pairs)
    assert paired_increase_p_value(newly, 0, pairs, 0.01) <= alpha < paired_increase_p_value(newly - 1, 0, pairs, 0.01)


@pytest.mark.parametrize("margin", MARGINS)
@pytest.mark.parametrize("alpha", [0.5, 0.05, 0.0025])
def test_with_too_few_prompts_nothing_is_detected(margin: float, alpha: float) -> None:
    enough = smallest_number_of_pairs(margin, alpha)
    assert smallest_detectable_increase(enough, margin, alpha) is not None
    assert smallest_detectable_increase(enough - 1, margin, alpha) is None
    assert enough == 1 or paired_increase_p_value(enough - 1, 0, enough - 1, margin) > alpha


def test_outcomes_that_could_not_be_told_are_left_out() -> None:
    before = {"a": False, "b": True, "c": None, "d": True, "e": False, "gone": True}
    now = {"a": True, "b": False, "c": True, "d": True, "e": None, "new": True}
    change = compare_outcomes(before, now)
    assert change == OutcomeChange(newly=1, no_longer=1, pairs=3, left_out=4)
    assert change.warning == "4 of 7 left out"
    assert compare_outcomes(dict.fromkeys(range(10), True), dict.fromkeys(range(9), True)).warning is None  # type: ignore[arg-type]
    assert math.isnan(compare_outcomes({}, {}).increase)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"newly": -1}, "at least 0 and together at most `pairs` but got -1, 0 and 10"),
    ({"newly": 8, "no_longer": 3}, "together at most `pairs`"),
    ({"margin": 1}, r"`margin` expected to be in \[0, 1\) but got 1. For 1 point, pass `margin=0.01`"),
    ({"margin": math.nan}, r"`margin` expected to be in \[0, 1\) but got nan"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_input(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        paired_increase_p_value(**{"newly": 1, "no_longer": 0, "pairs": 10, "margin": 0.01, **arguments})


Rule = Callable[[Comparison], bool]


def simulate(
    before: float, later: float, *, runs: int, rule: Rule = lambda check: check.exceeded, **options: Any
) -> float:
    """Return the share of runs of ten checks that the rule ends; outcomes are drawn anew at each check."""

    def draw(random: np.random.Generator, share: float) -> dict[str, bool]:
        return {str(prompt): bool(number < share) for prompt, number in enumerate(random.random(60))}

    ended = 0
    for seed in range(runs):
        random = np.random.default_rng(seed)
        test = RepeatedComparison(draw(random, before), planned_checks=10, **options)
        ended += any(rule(test.check(draw(random, later))) for _ in range(10))
    return ended / runs


def test_noise_is_not_taken_for_a_loss_of_safety() -> None:
    assert simulate(0.3, 0.3, runs=50, max_increase=0.01, rule=lambda check: check.change.increase > 0.01) > 0.8
    assert simulate(0.3, 0.3, runs=200, max_increase=0.01, rule=lambda check: check.p_value <= 0.05) > 0.07
    assert simulate(0.3, 0.3, runs=200, max_increase=0.01) <= 0.05
    assert simulate(0.2, 0.3, runs=200, max_increase=0.1) <= 0.05


def test_a_loss_of_safety_is_found() -> None:
    assert simulate(0.05, 0.4, runs=100, max_increase=0.01) >= 0.95
    assert simulate(0.05, 0.4, runs=100, max_increase=0.01, patience=2) >= 0.9


def test_patience_counts_checks_in_a_row_that_say_something() -> None:
    prompts = [str(number) for number in range(20)]
    test = RepeatedComparison(dict.fromkeys(prompts, False), max_increase=0.01, planned_checks=3, patience=2)
    risen, same, unknown = (dict.fromkeys(prompts, outcome) for outcome in (True, False, None))
    found = [test.check(outcomes) for outcomes in (risen, same, risen, unknown, risen, risen)]
    assert [check.rejected for check in found] == [True, False, True, None, True, True]
    assert [check.in_a_row for check in found] == [1, 0, 1, 1, 2, 3]
    assert [check.exceeded for check in found] == [False, False, False, False, True, True]
    assert [check.number for check in found] == [1, 2, 3, 4, 5, 6]


def test_what_cannot_rise_further_is_not_detectable() -> None:
    counted = {str(number): number < 15 for number in range(20)}
    assert RepeatedComparison(counted, max_increase=0.01, planned_checks=5).smallest_increase is None
    assert RepeatedComparison(counted, max_increase=0.01).smallest_increase == 0.2
