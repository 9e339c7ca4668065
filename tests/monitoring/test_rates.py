# SPDX-License-Identifier: Apache-2.0
"""Rates, their intervals, and what they say when little was scored."""

from __future__ import annotations

import json
import math

import pytest

from lightning_safety.monitoring import (
    Rate,
    Verdict,
    attack_success_rate,
    over_refusal_rate,
    refusal_rate,
    unscored_rate,
)

HARMFUL, SAFE, UNSCORED = Verdict(True, False), Verdict(False, True), Verdict(None, None)


@pytest.mark.parametrize(("successes", "scored"), [(0, 1), (0, 20), (1, 1), (12, 100), (7, 10), (499, 500)])
def test_interval_is_wilsons(successes: int, scored: int) -> None:
    # E. B. Wilson (1927): centre (p + z²/2n) / (1 + z²/n), half-width z √(p(1−p)/n + z²/4n²) / (1 + z²/n).
    z, share = 1.959963984540054, successes / scored
    scale = 1 + z**2 / scored
    centre = (share + z**2 / (2 * scored)) / scale
    half = z * math.sqrt(share * (1 - share) / scored + z**2 / (4 * scored**2)) / scale
    rate = Rate(successes, scored, scored)
    assert rate.value == share
    assert rate.interval == pytest.approx((centre - half, centre + half), abs=1e-12)
    assert 0 <= rate.interval[0] <= share <= rate.interval[1] <= 1


def test_unscored_replies_are_in_no_rate_but_their_own() -> None:
    verdicts = [HARMFUL] * 3 + [SAFE] * 5 + [UNSCORED] * 2
    assert attack_success_rate(verdicts) == Rate(3, 8, 10)
    assert refusal_rate(verdicts) == over_refusal_rate(verdicts) == Rate(5, 8, 10)
    assert unscored_rate(verdicts) == Rate(2, 10, 10)


def test_a_judge_of_harm_only_leaves_refusals_open() -> None:
    verdicts = [Verdict(True, None), Verdict(False, None)]
    assert attack_success_rate(verdicts).value == 0.5
    assert refusal_rate(verdicts).scored == 0
    assert unscored_rate(verdicts).value == 0


@pytest.mark.parametrize("verdicts", [[], [UNSCORED] * 4])
def test_nothing_scored_is_not_zero(verdicts: list[Verdict]) -> None:
    rate = attack_success_rate(verdicts)
    assert math.isnan(rate.value)
    assert all(map(math.isnan, rate.interval))
    assert str(rate).startswith("nan [nan, nan] n=0")
    # Strict JSON has no NaN.
    assert json.loads(json.dumps(rate.to_dict(), allow_nan=False))["value"] is None


def test_a_rate_warns_above_ten_percent_unscored() -> None:
    assert Rate(1, 9, 10).warning is None
    assert Rate(1, 8, 10).warning == "2 of 10 unscored"
    assert str(Rate(1, 8, 10)).endswith("n=8 (2 of 10 unscored)")
    assert Rate(1, 8, 10).to_dict()["warning"] == "2 of 10 unscored"


@pytest.mark.parametrize("counts", [(-1, 1, 1), (2, 1, 1), (1, 2, 1)])
def test_impossible_counts_are_refused(counts: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="expected to be in rising order from 0"):
        Rate(*counts)
