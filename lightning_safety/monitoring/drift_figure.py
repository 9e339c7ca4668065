# SPDX-License-Identifier: Apache-2.0
"""A picture of how far fine-tuning moved along alignment's directions: by energy and component, and by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lightning_safety.monitoring.drift import DriftSummary


def draw_drift(summaries: Sequence[DriftSummary], pair: str) -> Figure:
    """Draw overlap by energy for each component, and by layer at the middle energy, beside random subspaces.

    No global state of matplotlib is touched.

    Args:
        summaries: What `summarise_drift` returned.
        pair: Which of its pairs.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "The figure needs matplotlib, which is not installed. Install it with "
            "`pip install 'lightning-safety[report]'`."
        ) from error
    found = [one for one in summaries if one.pair == pair]
    energies = sorted({one.energy for one in found})
    middle = energies[len(energies) // 2]
    figure = Figure(figsize=(11, 4.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    by_energy, by_layer = figure.subplots(1, 2)
    for group in dict.fromkeys(one.group for one in found if one.group.startswith("component ")):
        rows = [one for one in found if one.group == group]
        label = group.removeprefix("component ")
        (line,) = by_energy.plot([row.energy for row in rows], [row.overlap for row in rows], marker="o", label=label)
        _random(by_energy, [row.energy for row in rows], rows, line.get_color())
    by_energy.set_xlabel("share of energy kept")
    by_energy.set_title("by component (dashed: random subspaces)", fontsize=11)
    by_energy.legend(fontsize=8, ncols=2)
    rows = [one for one in found if one.group.startswith("layer ") and one.energy == middle]
    layers = [one.group.removeprefix("layer ") for one in rows]
    (line,) = by_layer.plot(layers, [row.overlap for row in rows], marker="o")
    _random(by_layer, layers, rows, line.get_color())
    by_layer.set_xlabel("layer")
    by_layer.tick_params(axis="x", labelsize=7)
    by_layer.set_title(f"by layer, {middle:.0%} of the energy", fontsize=11)
    for axes in (by_energy, by_layer):
        axes.set_ylabel("subspace overlap")
        axes.set_ylim(bottom=0)
    figure.suptitle(pair.replace("|", "against"), fontsize=12)
    return figure


def _random(axes: Any, places: Sequence[Any], rows: Sequence[DriftSummary], colour: str) -> None:
    axes.plot(places, [row.overlap_random for row in rows], linestyle="--", linewidth=1, color=colour)
