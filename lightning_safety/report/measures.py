# SPDX-License-Identifier: Apache-2.0
"""Values with what they are worth, as they stand in ``results.json`` and ``safety.jsonl``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightning_safety.report.words import number

_LARGEST = 1e300  # JSON has integers that no float holds.


@dataclass(frozen=True)
class Measure:
    """One value.

    Attributes:
        value: None where nothing could be measured.
        low: Lower end of the 95 % interval; None where there is none.
        high: Its upper end.
        count: How many replies or examples the value is of; None where that is not known.
        warning: What to say beside the value.
        is_rate: Whether it is a share, between 0 and 1.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    count: int | None = None
    warning: str = ""
    is_rate: bool = False

    @property
    def number(self) -> str:
        """The value as text; rates with two decimals."""
        return number(self.value, decimals=2 if self.is_rate else None)

    @property
    def interval(self) -> str:
        """The interval in brackets; empty where there is none."""
        if self.low is None or self.high is None:
            return ""
        decimals = 2 if self.is_rate else None
        return f"[{number(self.low, decimals=decimals)}, {number(self.high, decimals=decimals)}]"

    def __str__(self) -> str:
        return f"{self.number} {self.interval}".strip()

    def overlaps(self, other: Measure) -> bool | None:
        """Whether the intervals of two values overlap; None where one has no interval."""
        if self.low is None or self.high is None or other.low is None or other.high is None:
            return None
        return self.low <= other.high and other.low <= self.high


def measure(entry: object) -> Measure | None:
    """Read a value: a number, null, or an object with value, interval and counts.

    Returns:
        The measure; None for what is none of these.

    Example:
        >>> str(measure({"value": 0.15, "low": 0.1, "high": 0.23, "successes": 17, "scored": 110, "total": 110}))
        '0.15 [0.10, 0.23]'
        >>> measure("keyword_refusal") is None
        True
    """
    if entry is None or _is_number(entry):
        return Measure(_finite(entry))
    if not isinstance(entry, dict) or "value" not in entry:
        return None
    counts = [entry[name] for name in ("scored", "examples") if isinstance(entry.get(name), int)]
    warning = entry.get("warning")
    return Measure(
        _finite(entry["value"]),
        _finite(entry.get("low")),
        _finite(entry.get("high")),
        counts[0] if counts else None,
        warning if isinstance(warning, str) else "",
        "scored" in entry,
    )


def _is_number(entry: Any) -> bool:
    return isinstance(entry, int | float) and not isinstance(entry, bool)


def _finite(entry: Any) -> float | None:
    return float(entry) if _is_number(entry) and abs(entry) < _LARGEST else None
