# SPDX-License-Identifier: Apache-2.0
"""A picture of where the selected weights are: enrichment by layer and component."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning_safety.drawing import new_figure
from lightning_safety.files import replace_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lightning_safety.scoring.describe import MaskDescription

_LIMIT = 3  # Colours end at a factor of 2³; a cell's number says the rest.


@dataclass(frozen=True)
class HeatmapStyle:
    """How a heatmap looks; the default is for paper.

    Attributes:
        background: Colour behind everything.
        text: Colour of labels.
        colours: From the colour of too few weights over that of as many as at random to that of too many. Empty:
            matplotlib's blue, white and red.
        title: Whether the picture says what it shows; a page around it may.
        cell: Width and height of a cell, in inches.
        dpi: Pixels an inch.
    """

    background: str = "white"
    text: str = "black"
    colours: tuple[str, ...] = ()
    title: bool = True
    cell: tuple[float, float] = (0.75, 0.27)
    dpi: int = 150


def draw_heatmap(description: MaskDescription, path: str | os.PathLike[str]) -> None:
    """Write the picture of `heatmap_figure` as a PNG.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        OSError: The file cannot be written. An older file stays as it was.
    """
    figure = heatmap_figure(description)
    with replace_atomically(path) as temporary:
        figure.savefig(temporary, format="png")


def heatmap_figure(description: MaskDescription, style: HeatmapStyle | None = None) -> Figure:
    """Draw a figure whose colour is log₂ of the enrichment: red above what a random mask would hold, blue below.

    Pairs of layer and component without weights stay blank. No global state of matplotlib is touched.

    Args:
        description: Where the weights are.
        style: How it looks. Default: dark on white.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    style = style or HeatmapStyle()
    layers = [row.group for row in description.layers]
    components = [row.group for row in description.components]
    width, height = style.cell
    figure = new_figure(
        2.8 + width * len(components), 1.9 + height * len(layers), dpi=style.dpi, background=style.background
    )
    axes = figure.subplots()
    axes.set_facecolor(style.background)
    image = _draw_cells(axes, description, layers, components, style)
    axes.set_xticks(range(len(components)), components, fontsize=10)
    axes.set_yticks(range(len(layers)), layers, fontsize=9)
    axes.set_xlabel("component", color=style.text)
    axes.set_ylabel("layer", color=style.text)
    if style.title:
        axes.set_title("Where the selected weights are\n(1 = as many as at random)", fontsize=11, color=style.text)
    ticks = range(-_LIMIT, _LIMIT + 1)
    bar = figure.colorbar(image, ax=axes, ticks=list(ticks), extend="both")
    bar.ax.set_yticklabels([_factor(tick) for tick in ticks])
    # What enrichment is, a page around the picture says; in two lines it fits beside few layers.
    meaning = "\nshare of selected ÷ share of scored" if style.title else ""
    bar.set_label(f"enrichment{meaning}", color=style.text)
    for part in (axes, bar.ax):
        part.tick_params(colors=style.text)
        for spine in part.spines.values():
            spine.set_color(style.text)
    for tick in (*axes.get_xticklabels(), *axes.get_yticklabels()):
        tick.set_parse_math(False)  # A dollar sign in a weight's name begins no formula.
    return figure


def _draw_cells(
    axes: Any, description: MaskDescription, layers: list[str], components: list[str], style: HeatmapStyle
) -> Any:
    """Draw one coloured, numbered cell for each pair that has weights. Returns the image."""
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    colours = LinearSegmentedColormap.from_list("enrichment", style.colours) if style.colours else "RdBu_r"
    exponents = [[math.nan] * len(components) for _ in layers]
    for row, layer in enumerate(layers):
        for column, component in enumerate(components):
            cell = description.cells.get((layer, component))
            if cell is not None and not math.isnan(cell.enrichment):
                exponent = math.log2(cell.enrichment) if cell.enrichment else -math.inf
                exponents[row][column] = max(-_LIMIT, min(_LIMIT, exponent))
    image = axes.imshow(exponents, cmap=colours, norm=Normalize(-_LIMIT, _LIMIT), aspect="auto")
    for row, layer in enumerate(layers):
        for column, component in enumerate(components):
            if not math.isnan(exponents[row][column]):
                enrichment = description.cells[layer, component].enrichment
                text = f"{enrichment:.2g}" if enrichment < 100 else f"{enrichment:.0f}"
                red, green, blue, _ = image.to_rgba(exponents[row][column])
                dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
                axes.text(column, row, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")
    return image


def _factor(exponent: int) -> str:
    return f"1/{2**-exponent}" if exponent < 0 else f"{2**exponent}"
