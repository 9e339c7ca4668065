# SPDX-License-Identifier: Apache-2.0
"""A picture of how far fine-tuning moved along alignment's directions: by energy and component, and by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning_safety.drawing import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lightning_safety.monitoring.drift import DriftSummary

_QUANTITIES = {"overlap": "subspace overlap", "energy_kept": "energy kept"}


def draw_drift(summaries: Sequence[DriftSummary], pair: str) -> Figure:
    """Draw overlap and energy kept, by energy for each component and by layer at the middle energy.

    Each has its values for random subspaces beside it, dashed. No global state of matplotlib is touched.

    Args:
        summaries: What `summarise_drift` returned.
        pair: Which of its pairs.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    found = [one for one in summaries if one.pair == pair]
    energies = sorted({one.energy for one in found})
    middle = energies[len(energies) // 2]
    figure = new_figure(11, 8)
    panels = figure.subplots(2, 2, sharex="col")
    for (by_energy, by_layer), (quantity, label) in zip(panels, _QUANTITIES.items(), strict=True):
        for group in dict.fromkeys(one.group for one in found if one.group.startswith("component ")):
            rows = [one for one in found if one.group == group]
            _draw(by_energy, [row.energy for row in rows], rows, quantity, group.removeprefix("component "))
        rows = [one for one in found if one.group.startswith("layer ") and one.energy == middle]
        _draw(by_layer, [one.group.removeprefix("layer ") for one in rows], rows, quantity, "all")
        for axes in (by_energy, by_layer):
            axes.set_ylabel(label)
            axes.set_ylim(bottom=0)
    panels[0, 0].set_title("by component (dashed: random subspaces)", fontsize=11)
    panels[0, 0].legend(fontsize=8, ncols=2)
    panels[0, 1].set_title(f"by layer, {middle:.0%} of the energy", fontsize=11)
    panels[1, 0].set_xlabel("share of energy")
    panels[1, 1].set_xlabel("layer")
    panels[1, 1].tick_params(axis="x", labelsize=7)
    figure.suptitle(pair.replace("|", "against"), fontsize=12)
    return figure


def _draw(axes: Any, places: Sequence[Any], rows: Sequence[DriftSummary], quantity: str, label: str) -> None:
    (line,) = axes.plot(places, [getattr(row, quantity) for row in rows], marker="o", label=label)
    random = [getattr(row, f"{quantity}_random") for row in rows]
    axes.plot(places, random, linestyle="--", linewidth=1, color=line.get_color())
