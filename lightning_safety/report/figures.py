# SPDX-License-Identifier: Apache-2.0
"""The figures of the report as PNG pictures. No global state of matplotlib is touched."""

from __future__ import annotations

import base64
import io
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning_safety.drawing import new_figure
from lightning_safety.report.colours import DARK, LIGHT, Colours
from lightning_safety.report.panels import Line, Panel
from lightning_safety.report.words import number
from lightning_safety.scoring.describe import MaskDescription
from lightning_safety.scoring.heatmap import heatmap_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SIZE = (4.2, 2.5)  # Inches; small, so that letters can be read where the picture is as wide as a phone.
_DPI = 240
_MARKERS = "osD^vP"
_MANY_POINTS = 40
_CELLS_NAMED = 5
_WIDTH_PER_INCH = 104


@dataclass(frozen=True)
class Heatmap:
    """Where the weights of one mask are.

    Attributes:
        run: The run's name.
        name: The mask's.
        description: Where its weights are.
    """

    run: str
    name: str
    description: MaskDescription

    @property
    def words(self) -> str:
        """The picture in words, with the numbers that stand out."""
        description = self.description
        cells = [(place, cell) for place, cell in description.cells.items() if cell.selected]
        cells.sort(key=lambda pair: pair[1].enrichment, reverse=True)
        highest = [f"layer {layer} {part} {number(cell.enrichment)}" for (layer, part), cell in cells[:_CELLS_NAMED]]
        components = [f"{row.group} {number(row.enrichment)}" for row in description.components]
        return (
            f"Heatmap of enrichment by layer and component for {description.mask}; 1 is as many as at random."
            f" By component: {', '.join(components)}. Highest: {', '.join(highest) or 'none'}."
            f" {len(description.cells) - len(cells)} of {len(description.cells)} cells hold none."
        )


@dataclass(frozen=True)
class Picture:
    """A figure for daylight and for the dark, as ``data:`` addresses, and the size to show it in, in CSS pixels."""

    light: str
    dark: str
    width: int
    height: int


def draw_pictures(subject: Panel | Heatmap) -> Picture:
    """Draw a figure for daylight and for the dark.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    light, dark = (
        draw_panel(subject, colours)
        if isinstance(subject, Panel)
        else heatmap_figure(subject.description, colours.heatmap)
        for colours in (LIGHT, DARK)
    )
    width, height = (round(inches * _WIDTH_PER_INCH) for inches in light.get_size_inches())
    return Picture(_address(light), _address(dark), width, height)


def _address(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def draw_panel(panel: Panel, colours: Colours) -> Figure:
    """Draw curves over optimizer steps, with their intervals as bands and their budgets as lines.

    The legend is the page's, where names of any script can be read and are text.
    """
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(*_SIZE, dpi=_DPI, background=colours.card)
    axes = figure.subplots()
    axes.set_facecolor(colours.card)
    # Controls first: what was measured lies on top.
    for line in sorted(panel.lines, key=lambda line: not line.control):
        _draw_line(axes, line, colours)
    for limit in panel.limits.values():
        axes.axhline(limit, color=colours.limit, linewidth=1.4, linestyle=(0, (5, 2, 1, 2)))
    if panel.is_rate:
        axes.set_ylim(-0.02, 1.02)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    axes.set_xlabel("optimizer steps", color=colours.quiet, fontsize=9)
    axes.grid(axis="y", color=colours.line, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=colours.quiet, labelsize=9, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(colours.line)
    return figure


def _draw_line(axes: Any, line: Line, colours: Colours) -> None:
    steps = [point.step for point in line.points]
    values, lows, highs = (
        [math.nan if value is None else value for value in column]
        for column in zip(*((one.measure.value, one.measure.low, one.measure.high) for one in line.points), strict=True)
    )
    colour = colours.series[line.colour % len(colours.series)]
    strength = 0.75 if line.control else 1.0
    axes.plot(
        steps,
        values,
        color=colour,
        alpha=strength,
        linewidth=1.3 if line.control else 1.9,
        linestyle=(0, (2, 2)) if line.control else "-",
        marker=_MARKERS[line.colour % len(_MARKERS)] if len(steps) <= _MANY_POINTS else None,
        markersize=4,
        markerfacecolor=colours.card if line.control else colour,
    )
    if line.control:
        return
    axes.fill_between(steps, lows, highs, color=colour, alpha=0.13, linewidth=0)
    # A band has no width at a single point.
    for step, low, high in zip(steps, lows, highs, strict=True):
        if len(steps) <= _MANY_POINTS:
            axes.plot([step, step], [low, high], color=colour, alpha=0.45, linewidth=1.1)
