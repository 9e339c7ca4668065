# SPDX-License-Identifier: Apache-2.0
"""A picture of where the selected weights are: enrichment by layer and component."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any

from lightning_safety.files import replace_atomically

if TYPE_CHECKING:
    from lightning_safety.scoring.describe import MaskDescription

_LIMIT = 3  # Colours end at a factor of 2³; a cell's number says the rest.


def draw_heatmap(description: MaskDescription, path: str | os.PathLike[str]) -> None:
    """Write a PNG whose colour is log₂ of the enrichment: red above what a random mask would hold, blue below.

    Pairs of layer and component without weights stay blank. No global state of matplotlib is touched.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        OSError: The file cannot be written. An older file stays as it was.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "`heatmap` needs matplotlib, which is not installed."
            " Install it with `pip install 'lightning-safety[report]'`."
        ) from error
    layers = [row.group for row in description.layers]
    components = [row.group for row in description.components]
    # Constrained layout keeps labels of any length inside of the figure.
    figure = Figure(figsize=(2.8 + 0.75 * len(components), 1.9 + 0.27 * len(layers)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    image = _draw_cells(axes, description, layers, components)
    axes.set_xticks(range(len(components)), components, fontsize=10)
    axes.set_yticks(range(len(layers)), layers, fontsize=9)
    axes.set_xlabel("component")
    axes.set_ylabel("layer")
    axes.set_title("Where the selected weights are\n(1 = as many as at random)", fontsize=11)
    ticks = range(-_LIMIT, _LIMIT + 1)
    bar = figure.colorbar(image, ax=axes, ticks=list(ticks), extend="both")
    bar.ax.set_yticklabels([_factor(tick) for tick in ticks])
    bar.set_label("enrichment: share of selected ÷ share of scored")
    with replace_atomically(path) as temporary:
        figure.savefig(temporary, format="png")


def _draw_cells(axes: Any, description: MaskDescription, layers: list[str], components: list[str]) -> Any:
    """Draw one coloured, numbered cell for each pair that has weights. Returns the image."""
    colours = [[math.nan] * len(components) for _ in layers]
    for row, layer in enumerate(layers):
        for column, component in enumerate(components):
            cell = description.cells.get((layer, component))
            if cell is None or math.isnan(cell.enrichment):
                continue
            exponent = math.log2(cell.enrichment) if cell.enrichment else -math.inf
            colours[row][column] = max(-_LIMIT, min(_LIMIT, exponent))
            text = f"{cell.enrichment:.2g}" if cell.enrichment < 100 else f"{cell.enrichment:.0f}"
            white = abs(colours[row][column]) > 0.7 * _LIMIT
            axes.text(column, row, text, ha="center", va="center", fontsize=8, color="white" if white else "black")
    return axes.imshow(colours, cmap="RdBu_r", vmin=-_LIMIT, vmax=_LIMIT, aspect="auto")


def _factor(exponent: int) -> str:
    return f"1/{2**-exponent}" if exponent < 0 else f"{2**exponent}"
