# SPDX-License-Identifier: Apache-2.0
"""Comparing the same prompts with their baseline again and again, with one probability of a false alarm for all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lightning_safety.arguments import check_positive
from lightning_safety.monitoring.paired import (
    OutcomeChange,
    check_alpha,
    check_margin,
    compare_outcomes,
    paired_increase_p_value,
    smallest_detectable_increase,
    smallest_number_of_pairs,
)


@dataclass(frozen=True)
class Comparison:
    """What one comparison with the baseline found.

    Attributes:
        change: The counts.
        p_value: Of the hypothesis that the share has risen by no more than is tolerated.
        rejected: Whether that hypothesis is rejected. None: too few prompts could be told to reject it whatever they
            say.
        in_a_row: How many comparisons have rejected since the last that did not; those that say nothing do not count.
        exceeded: Whether that is as many as patience asks for.
        number: Which comparison this is, from 1.
    """

    change: OutcomeChange
    p_value: float
    rejected: bool | None
    in_a_row: int
    exceeded: bool
    number: int


class RepeatedComparison:
    """Tells at each of several planned checks whether a share has risen by more than is tolerated since the first.

    Each check is the exact test of `paired_increase_p_value` at the level `alpha` / `planned_checks` (Bonferroni), so
    that a share that has not risen by more than `max_increase` is reported in at most `alpha` of all runs, however
    its checks depend on each other. Patience lowers that further.

    Args:
        before: Whether it happened at the baseline, by prompt. None: that could not be told.
        max_increase: The increase to tolerate, as a share of the prompts, in [0, 1).
        alpha: The probability of a false alarm in all checks together, in (0, 1).
        planned_checks: How many checks there will be after the baseline.
        patience: How many checks in a row have to reject.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: An argument is out of range.

    Example:
        >>> prompts = [f"prompt {number}" for number in range(40)]
        >>> test = RepeatedComparison(dict.fromkeys(prompts, False), max_increase=0.01, alpha=0.05, planned_checks=5)
        >>> test.smallest_increase
        0.15
        >>> test.check({prompt: number < 6 for number, prompt in enumerate(prompts)}).exceeded
        True
    """

    def __init__(
        self,
        before: Mapping[str, bool | None],
        *,
        max_increase: float,
        alpha: float = 0.05,
        planned_checks: int = 1,
        patience: int = 1,
    ) -> None:
        self.before = dict(before)
        self.max_increase = check_margin(max_increase, "max_increase")
        self.planned_checks = check_positive(planned_checks, "planned_checks")
        self.alpha = check_alpha(alpha)
        self.patience = check_positive(patience, "patience")
        self.checks = 0
        self.in_a_row = 0

    @property
    def level(self) -> float:
        """The level of each check."""
        return self.alpha / self.planned_checks

    @property
    def pairs(self) -> int:
        """The prompts whose baseline could be told."""
        return sum(outcome is not None for outcome in self.before.values())

    @property
    def room(self) -> int:
        """Of these, the ones on which it did not happen, and may newly."""
        return sum(outcome is False for outcome in self.before.values())

    @property
    def smallest_increase(self) -> float | None:
        """The smallest increase that a check can detect; None if none could, or it does not fit in the room."""
        smallest = smallest_detectable_increase(self.pairs, self.max_increase, self.level)
        return smallest if smallest is not None and round(smallest * self.pairs) <= self.room else None

    @property
    def smallest_number_of_prompts(self) -> int:
        """With fewer prompts a check can detect nothing."""
        return smallest_number_of_pairs(self.max_increase, self.level)

    def check(self, now: Mapping[str, bool | None]) -> Comparison:
        """Compare with the baseline, and count the check."""
        change = compare_outcomes(self.before, now)
        p_value = paired_increase_p_value(change.newly, change.no_longer, change.pairs, self.max_increase)
        self.checks += 1
        rejected = None if change.pairs < self.smallest_number_of_prompts else p_value <= self.level
        if rejected is not None:
            self.in_a_row = self.in_a_row + 1 if rejected else 0
        exceeded = bool(rejected) and self.in_a_row >= self.patience
        return Comparison(change, p_value, rejected, self.in_a_row, exceeded, self.checks)
