# SPDX-License-Identifier: Apache-2.0
"""The colours of the page and of its figures, by daylight and in the dark."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_safety.scoring.heatmap import HeatmapStyle


@dataclass(frozen=True)
class Colours:
    """Colours by what they are for, as CSS and matplotlib write them.

    Attributes:
        page: Behind everything.
        card: Behind tables and figures.
        text: Words and numbers.
        quiet: What is said beside them.
        line: Rules and grids.
        accent: Links, marks.
        warning: What should be noticed.
        limit: A budget's line.
        series: Curves, in order.
        heat: Of the heatmap, from too few weights to too many.
    """

    page: str
    card: str
    text: str
    quiet: str
    line: str
    accent: str
    warning: str
    limit: str
    series: tuple[str, ...]
    heat: tuple[str, ...]

    @property
    def heatmap(self) -> HeatmapStyle:
        """How the heatmap looks in these colours."""
        return HeatmapStyle(self.card, self.text, self.heat, title=False, cell=(0.52, 0.25), dpi=180)


LIGHT = Colours(
    page="#f6f7f8",
    card="#ffffff",
    text="#1d2329",
    quiet="#59636e",
    line="#dde2e7",
    accent="#1f6b87",
    warning="#9a4a00",
    limit="#b3261e",
    series=("#1f6b87", "#c05717", "#6a4fa0", "#39783f", "#a4345a", "#77681b"),
    heat=("#2c6aa3", "#8db8d8", "#f4f4f2", "#e3a283", "#b1442c"),
)
DARK = Colours(
    page="#121619",
    card="#1a2025",
    text="#e4e8eb",
    quiet="#9ba6b0",
    line="#323b43",
    accent="#74bdd8",
    warning="#f0b072",
    limit="#ff8f86",
    series=("#74bdd8", "#f0a070", "#b9a2ea", "#8acb90", "#f08cab", "#d3c168"),
    heat=("#7db7ea", "#3d6d94", "#262d33", "#9c5540", "#f59a78"),
)
