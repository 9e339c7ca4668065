# SPDX-License-Identifier: Apache-2.0
"""Where the weights of highest score lie, against the size of each component and layer."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_safety.drawing import new_figure
from lightning_safety.monitoring.table import markdown_table
from lightning_safety.report.colours import LIGHT
from lightning_safety.report.studies.looks import MISSING
from lightning_safety.report.studies.reading import StudyResults, write_study

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_GROUPINGS = ("components", "layers")
_NORMAL_95 = 1.96


def write_pattern(results: StudyResults, output: Path) -> str:
    """Write ``results.md`` and, with matplotlib, a figure.

    Args:
        results: Of a cell for each model.
        output: The folder.

    Returns:
        The text of ``results.md``.
    """
    parts = [_table(grouping, results.found) for grouping in _GROUPINGS if results.found]
    parts += [_stability(results.found)] if results.found else []
    figures = {"pattern": partial(draw_pattern, results.found)} if results.found else {}
    return write_study("\n\n".join([*parts, results.footer]), figures, output)


def draw_pattern(found: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Draw enrichment with its interval by component and by layer, a colour for each model; 1 is what chance gives.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    figure = new_figure(12, 4)
    panels = figure.subplots(1, 2, width_ratios=(1, 2))
    for axes, grouping in zip(panels, _GROUPINGS, strict=True):
        width = 0.8 / len(found)
        names = list(dict.fromkeys(group["group"] for one in found.values() for group in one[grouping]))
        for number, (model, one) in enumerate(found.items()):
            groups = {group["group"]: group for group in one[grouping]}
            places = [names.index(name) + (number + 0.5) * width - 0.4 for name in groups]
            axes.bar(
                places,
                [group["enrichment"] for group in groups.values()],
                width * 0.92,
                yerr=[_NORMAL_95 * _spread(group) for group in groups.values()],
                color=LIGHT.series[number % len(LIGHT.series)],
                error_kw={"linewidth": 1},
                label=model,
            )
        axes.axhline(1, color=LIGHT.quiet, linewidth=1, linestyle="--", label="chance")
        axes.set_xticks(range(len(names)), names, fontsize=8)
        axes.set_xlabel(grouping[:-1])
    panels[0].set_ylabel("share of the selected over share of all")
    panels[0].legend(fontsize=8)
    return figure


def _table(grouping: str, found: Mapping[str, Mapping[str, Any]]) -> str:
    by_model = {model: {group["group"]: group for group in one[grouping]} for model, one in found.items()}
    names = list(dict.fromkeys(name for groups in by_model.values() for name in groups))
    lines = [[grouping[:-1], "weights", *by_model]]
    for name in names:
        weights = next(groups[name]["weights"] for groups in by_model.values() if name in groups)
        cells = [_cell(groups[name]) if name in groups else MISSING for groups in by_model.values()]
        lines.append([name, f"{weights:,}", *cells])
    one = next(iter(found.values()))
    share = 100 * one["selected"] / one["scored"]
    return "\n".join([f"### Enrichment of the top {share:.3g} % by {grouping[:-1]}", "", *markdown_table(lines)])


def _cell(group: Mapping[str, Any]) -> str:
    value, reach = group["enrichment"], _NORMAL_95 * _spread(group)
    return f"{value:.2f} [{max(0.0, value - reach):.2f}, {value + reach:.2f}]"


def _spread(group: Mapping[str, Any]) -> float:
    """Return the standard error by the bootstrap; not a number for fewer than two resamples."""
    resampled = group["resampled"]
    return statistics.stdev(resampled) if len(resampled) > 1 else float("nan")


def _stability(found: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [["", "prompts", "resamples", "Jaccard with the mask of a resample: mean", "lowest", "of two random masks"]]
    for model, one in found.items():
        values = one["jaccard"]
        chance = one["selected"] / one["scored"]
        lines.append(
            [
                model,
                str(one["prompts"]),
                str(len(values)),
                f"{statistics.mean(values):.3f}",
                f"{min(values):.3f}",
                f"{chance / (2 - chance):.4f}",
            ]
        )
    return "\n".join(["### How far the mask depends on the prompts", "", *markdown_table(lines)])
