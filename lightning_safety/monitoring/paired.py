# SPDX-License-Identifier: Apache-2.0
"""Whether something happens on more prompts than before: an exact test on the same prompts, repeated during a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.special import betainc, gammaln, xlog1py, xlogy

from lightning_safety.monitoring.rates import LARGEST_UNSCORED_SHARE

_Array = NDArray[np.float64]
_GRID_POINTS_PER_DEVIATION = 20
_ANGLES_AT_A_TIME = 64
_MOST_REFINED_PEAKS = 5
_REFINEMENTS = 3
_WINDOW_IN_DEVIATIONS = 10.0
# Tables whose statistics are equal in exact arithmetic must not be told apart by rounding.
_SAME_STATISTIC = 1e-9


@dataclass(frozen=True)
class OutcomeChange:
    """How outcomes by prompt differ between two times.

    Attributes:
        newly: Prompts on which it happens now and did not before.
        no_longer: Prompts on which it happened before and does not now.
        pairs: Prompts of which both could be told.
        left_out: Prompts of which one could not be told, or that only one time has.
    """

    newly: int
    no_longer: int
    pairs: int
    left_out: int

    @property
    def increase(self) -> float:
        """The observed increase of the share; NaN without a pair."""
        return (self.newly - self.no_longer) / self.pairs if self.pairs else math.nan

    @property
    def warning(self) -> str | None:
        """What to say beside a comparison that leaves out more than 10 % of the prompts."""
        total = self.pairs + self.left_out
        return f"{self.left_out} of {total} left out" if self.left_out > LARGEST_UNSCORED_SHARE * total else None


def compare_outcomes(before: Mapping[str, bool | None], now: Mapping[str, bool | None]) -> OutcomeChange:
    """Count what changed on the prompts of which both times say whether it happened.

    Args:
        before: Whether it happened, by prompt. None: that could not be told.
        now: The same, later.

    Example:
        >>> compare_outcomes({"a": False, "b": True, "c": None}, {"a": True, "b": True, "c": True})
        OutcomeChange(newly=1, no_longer=0, pairs=2, left_out=1)
    """
    prompts = before.keys() | now.keys()
    pairs = [(before.get(prompt), now.get(prompt)) for prompt in prompts]
    told = [pair for pair in pairs if None not in pair]
    return OutcomeChange(told.count((False, True)), told.count((True, False)), len(told), len(pairs) - len(told))


def paired_increase_p_value(newly: int, no_longer: int, pairs: int, margin: float) -> float:
    """Return the exact p-value of "the share has risen by no more than `margin`" against "by more".

    The test is unconditional: tables are ordered by Tango's score statistic (Tango, Statistics in Medicine 17, 1998,
    equation 12), and the probability of one at least as large is maximised over the unknown share of prompts on which
    it happens no longer (Hsueh, Liu & Chen, Biometrics 57, 2001). With `margin` 0 the statistic is McNemar's. The
    probability of a type I error is at most the level at which one rejects, for any number of prompts.

    Args:
        newly: Prompts on which it happens now and did not before.
        no_longer: Prompts on which it happened before and does not now.
        pairs: All prompts compared. 1,000 take about a tenth of a second; memory grows with their number only.
        margin: The increase to tolerate, as a share of the prompts, in [0, 1).

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> round(paired_increase_p_value(newly=6, no_longer=0, pairs=40, margin=0.01), 4)
        0.0098
    """
    if newly < 0 or no_longer < 0 or newly + no_longer > pairs:
        raise ValueError(
            "`newly` and `no_longer` expected to be at least 0 and together at most `pairs` but got "
            f"{newly}, {no_longer} and {pairs}."
        )
    check_margin(margin, "margin")
    return _p_value(int(newly), int(no_longer), int(pairs), float(margin))


def smallest_detectable_increase(pairs: int, margin: float, alpha: float) -> float | None:
    """Return the smallest observed increase that the test rejects, where nothing happens no longer.

    Args:
        pairs: All prompts compared.
        margin: The increase to tolerate, in [0, 1).
        alpha: The level, in (0, 1).

    Returns:
        A share of `pairs`; None if not even all prompts would suffice.

    Example:
        >>> smallest_detectable_increase(pairs=100, margin=0.01, alpha=0.05)
        0.05
    """
    check_margin(margin, "margin")
    check_alpha(alpha)
    if pairs < smallest_number_of_pairs(margin, alpha):
        return None
    below, enough = 0, pairs
    while enough - below > 1:
        middle = (below + enough) // 2
        rejects = paired_increase_p_value(middle, 0, pairs, margin) <= alpha
        below, enough = (below, middle) if rejects else (middle, enough)
    return enough / pairs


def smallest_number_of_pairs(margin: float, alpha: float) -> int:
    """Return with how many prompts the test can reject at all: if it happens newly on each of them.

    Example:
        >>> smallest_number_of_pairs(margin=0.01, alpha=0.05)
        5
    """
    check_margin(margin, "margin")
    check_alpha(alpha)
    # The largest share of new ones that the margin allows is (1 + margin) / 2: the p-value is its power.
    share = (1 + margin) / 2
    pairs = max(1, math.floor(math.log(alpha) / math.log(share)))
    while share**pairs > alpha:
        pairs += 1
    return pairs


def check_margin(value: float, name: str) -> float:
    """Return a tolerated increase as a float if it is in [0, 1).

    Raises:
        TypeError: It is not a number.
        ValueError: It is out of range.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(
            f"`{name}` expected to be a number in [0, 1) but got {value!r}. For 1 point, pass `{name}=0.01`."
        )
    if 0 <= value < 1:
        return float(value)
    points = value if 1 <= value < 100 else 1
    raise ValueError(
        f"`{name}` expected to be in [0, 1) but got {value}. For {points:g} {'point' if points == 1 else 'points'},"
        f" pass `{name}={points / 100:g}`."
    )


def check_alpha(value: float) -> float:
    """Return a probability of a false alarm as a float if it is in (0, 1).

    Raises:
        TypeError: It is not a number.
        ValueError: It is out of range.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"`alpha` expected to be a number in (0, 1) but got {value!r}. For 5 %, pass `alpha=0.05`.")
    if 0 < value < 1:
        return float(value)
    percent = value if 1 <= value < 100 else 5
    raise ValueError(
        f"`alpha` expected to be in (0, 1) but got {value}. For {percent:g} %, pass `alpha={percent / 100:g}`."
    )


@lru_cache(maxsize=4096)
def _p_value(newly: int, no_longer: int, pairs: int, margin: float) -> float:
    if pairs == 0:
        return 1.0
    observed = float(_statistic(np.array([newly]), np.array([no_longer]), pairs, margin)[0])
    least = _least_newly(observed - _SAME_STATISTIC * max(1.0, abs(observed)), pairs, margin)
    if np.all(least <= 0):
        return 1.0
    return min(1.0, _maximum(lambda angles: _probabilities(angles, least, pairs, margin), pairs, margin))


def _statistic(newly: NDArray[np.int64], no_longer: NDArray[np.int64], pairs: int, margin: float) -> _Array:
    """Return Tango's score statistic; 0 where nothing changed and the margin is 0. It rises with `newly`."""
    squared = 2.0 * pairs
    linear = (2.0 * pairs - newly + no_longer) * margin - newly - no_longer
    constant = -no_longer * margin * (1 - margin)
    root = np.sqrt(linear**2 - 4 * squared * constant)
    # The likeliest share of `no_longer` under the margin: the larger root, in the form that does not cancel.
    positive = linear > 0
    share = np.where(positive, -2 * constant / np.where(positive, linear + root, 1), (root - linear) / (2 * squared))
    variance = pairs * (2 * share + margin * (1 - margin))
    difference = newly - no_longer - pairs * margin
    return np.where(variance > 0, difference / np.sqrt(np.where(variance > 0, variance, 1)), 0.0)


def _least_newly(statistic: float, pairs: int, margin: float) -> NDArray[np.int64]:
    """Return, for each number of prompts on which it happens no longer, how many new ones give at least `statistic`.

    Returns:
        Counts for 0 … `pairs`, of length `pairs + 1`; one more than possible where no number does.
    """
    no_longer = np.arange(pairs + 1)
    below, enough = np.full(pairs + 1, -1), pairs - no_longer + 1
    for _ in range(pairs.bit_length() + 1):
        middle = (below + enough) // 2
        # Where the search has ended, `middle` is `below`, and may be -1.
        inside = np.maximum(middle, 0)
        reaches = (_statistic(inside, no_longer, pairs, margin) >= statistic) | (middle >= enough)
        ended = enough - below <= 1
        enough = np.where(reaches & ~ended, middle, enough)
        below = np.where(~reaches & ~ended, middle, below)
    return enough


def _probabilities(angles: _Array, least: NDArray[np.int64], pairs: int, margin: float) -> _Array:
    """Return the probability of a table in the tail for some shares close together.

    The table is a number of prompts on which it happens no longer and, given that, one of new ones among the others.

    Args:
        angles: What the shares of the former are the squared sines of, rising.
        least: How many new ones are in the tail, by the number of the former.
        pairs: All prompts.
        margin: How much larger the share of new ones is.
    """
    shares = np.sin(angles)[:, None] ** 2
    reach = _WINDOW_IN_DEVIATIONS * (np.sqrt(pairs * shares * (1 - shares)) + 1)
    first = max(0, math.floor(np.min(pairs * shares - reach)))
    last = min(pairs, math.ceil(np.max(pairs * shares + reach)))
    no_longer = np.arange(first, last + 1)
    others, needed = pairs - no_longer, least[first : last + 1]
    logarithm = gammaln(pairs + 1) - gammaln(no_longer + 1) - gammaln(others + 1)
    weights = np.exp(logarithm + xlogy(no_longer, shares) + xlog1py(others, -shares))
    new_shares = np.minimum(1.0, (shares + margin) / (1 - shares))
    possible = (needed > 0) & (needed <= others)
    tail = betainc(np.where(possible, needed, 1), np.where(possible, others - needed + 1, 1), new_shares)
    found: _Array = np.sum(weights * np.where(possible, tail, needed <= 0), axis=1)
    return found


def _maximum(function: Callable[[_Array], _Array], pairs: int, margin: float) -> float:
    """Return the maximum over the shares that the margin allows, given by the angles whose squared sines they are.

    A binomial share has the same deviation in every angle, so that equal steps are equally fine everywhere.

    Args:
        function: Of angles close together, rising.
        pairs: All prompts.
        margin: How much larger the share of new ones is.
    """
    end = math.asin(math.sqrt((1 - margin) / 2))
    steps = math.ceil(end * 2 * math.sqrt(pairs) * _GRID_POINTS_PER_DEVIATION) + 2
    angles = np.linspace(0, end, steps)
    values = np.concatenate([function(angles[i : i + _ANGLES_AT_A_TIME]) for i in range(0, steps, _ANGLES_AT_A_TIME)])
    padded = np.concatenate(([-1.0], values, [-1.0]))
    peaks = np.flatnonzero((values >= padded[:-2]) & (values >= padded[2:]))
    best = float(values.max())
    for peak in peaks[np.argsort(-values[peaks], kind="stable")][:_MOST_REFINED_PEAKS]:
        low, high = angles[max(peak - 1, 0)], angles[min(peak + 1, steps - 1)]
        for _ in range(_REFINEMENTS):
            finer = np.linspace(low, high, 9)
            found = function(finer)
            top = int(np.argmax(found))
            best = max(best, float(found[top]))
            low, high = finer[max(top - 1, 0)], finer[min(top + 1, 8)]
    return best
