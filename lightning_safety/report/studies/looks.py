# SPDX-License-Identifier: Apache-2.0
"""What a study saw of a model, as JSON holds it: rates by each judge, perplexity, tasks solved; and tables of these."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_safety.monitoring.rates import Rate
from lightning_safety.monitoring.table import markdown_table
from lightning_safety.report.colours import LIGHT

RATES = {"attack_success_rate": "attack success", "over_refusal_rate": "over-refusal"}
MISSING = "–"

_MARKERS = "osD^vPX*"


@dataclass(frozen=True)
class Look:
    """What was seen of a model.

    Attributes:
        rates: By judge, then by name.
        perplexity: Of written answers to harmless prompts: value, low, high.
        exact_match: Tasks with one right answer that were solved; None where none were set.
    """

    rates: Mapping[str, Mapping[str, Rate]]
    perplexity: tuple[float, float, float]
    exact_match: Rate | None

    def first(self, name: str = "attack_success_rate") -> Rate:
        """Return a rate of the first judge."""
        return next(iter(self.rates.values()))[name]


def read_look(found: Mapping[str, Any]) -> Look:
    """Read what `look_at` returned."""
    value, low, high = (_number(found["perplexity"][key]) for key in ("value", "low", "high"))
    solved = found.get("exact_match")
    return Look(
        {judge: {name: _rate(rate) for name, rate in rates.items()} for judge, rates in found["rates"].items()},
        (value, low, high),
        None if solved is None else _rate(solved),
    )


def looks_table(
    title: str,
    rows: Sequence[tuple[Sequence[str], Look]],
    labels: Sequence[str],
    more: Sequence[tuple[str, Sequence[str]]] = (),
) -> str:
    """Return a Markdown table of looks under a heading.

    Args:
        title: The heading.
        rows: What stands before each look, and the look.
        labels: The headings of what stands before.
        more: Further columns behind: heading, and a text for each row.
    """
    judges = list(rows[0][1].rates)
    solved = any(look.exact_match is not None for _, look in rows)
    heading = [*labels, *(f"{words}, {judge}" for words in RATES.values() for judge in judges), "perplexity of answers"]
    heading += ["tasks solved"] if solved else []
    lines = [[*heading, *(name for name, _ in more)]]
    for number, (before, look) in enumerate(rows):
        line = [*before, *(str(look.rates[judge][name]) for name in RATES for judge in judges)]
        value, low, high = look.perplexity
        line.append(f"{value:.2f} [{low:.2f}, {high:.2f}]")
        line += [MISSING if look.exact_match is None else str(look.exact_match)] if solved else []
        lines.append([*line, *(column[number] for _, column in more)])
    return "\n".join([f"### {title}", "", *markdown_table(lines)])


def arm_style(number: int, name: str) -> dict[str, str]:
    """Return colour and marker of the so-manieth of several arms, as matplotlib takes them; controls are hollow."""
    colour = LIGHT.series[number % len(LIGHT.series)]
    marker = _MARKERS[number // len(LIGHT.series) % len(_MARKERS)]
    return {"color": colour, "marker": marker, "markerfacecolor": "white" if "random" in name else colour}


def error_bars(rate: Rate) -> list[list[float]]:
    """Return how far a rate's interval reaches below and above it, as matplotlib takes it."""
    low, high = rate.interval
    return [[rate.value - low], [high - rate.value]]


def _rate(rate: Mapping[str, Any]) -> Rate:
    return Rate(rate["successes"], rate["scored"], rate["total"])


def _number(value: float | None) -> float:
    return math.nan if value is None else value
