# SPDX-License-Identifier: Apache-2.0
"""How far activations of harmful and of other prompts overlap and can be told apart, by layer."""

from __future__ import annotations

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

_PANELS = {
    "overlap": ("overlap", "overlap_shuffled", "overlap_random"),
    "overlap without the means": ("overlap_centred", "overlap_centred_shuffled", "overlap_centred_random"),
    "told apart by a line": ("separability", "separability_chance"),
}
_STYLES = ("-", "--", ":")
_CONTROLS = ("", " (sets drawn at random)", " (random subspaces)")


def write_activations(results: StudyResults, output: Path) -> str:
    """Write ``results.md`` and, with matplotlib, a figure for each set that harmful prompts are compared with.

    Args:
        results: Of the cells ``<set>/<model>``.
        output: The folder.

    Returns:
        The text of ``results.md``.
    """
    by_set: dict[str, dict[str, Mapping[str, Any]]] = {}
    for name, found in results.found.items():
        other, _, model = name.partition("/")
        by_set.setdefault(other, {})[model] = found
    parts = [_table(other, found) for other, found in by_set.items()]
    figures = {f"activations-{other}": partial(draw_activations, other, found) for other, found in by_set.items()}
    return write_study("\n\n".join([*parts, results.footer]), figures, output)


def draw_activations(other: str, found: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Draw overlap with its controls, and separability with chance, against the number of the layer.

    Args:
        other: The set that harmful prompts were compared with.
        found: Of each model.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    figure = new_figure(13, 4)
    for axes, (title, names) in zip(figure.subplots(1, 3), _PANELS.items(), strict=True):
        for colour, (model, one) in zip(LIGHT.series, found.items(), strict=False):
            numbers = [int(number) for number in one["layers"]]
            for style, name in zip(_STYLES, names, strict=False):
                values = [float("nan") if layer[name] is None else layer[name] for layer in one["layers"].values()]
                label = model if style == "-" else None
                axes.plot(numbers, values, style, color=colour, linewidth=1.4, label=label)
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("layer")
        axes.grid(color=LIGHT.line, linewidth=0.6)
    figure.axes[0].set_ylabel(f"harmful against {other}")
    figure.axes[0].legend(fontsize=8)
    return figure


def _table(other: str, found: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [["", "prompts", *(f"{title}{control}" for title, control in _columns())]]
    for model, one in found.items():
        cells = []
        for names in _PANELS.values():
            for name in names:
                values = [layer[name] for layer in one["layers"].values() if layer[name] is not None]
                cells.append(f"{sum(values) / len(values):.3f}" if values else MISSING)
        lines.append([model, " + ".join(map(str, one["prompts"])), *cells])
    count = len(next(iter(found.values()))["layers"])
    heading = f"### Harmful against {other} prompts: means over {count} hidden states"
    return "\n".join([heading, "", *markdown_table(lines)])


def _columns() -> list[tuple[str, str]]:
    columns = []
    for title, names in _PANELS.items():
        controls = _CONTROLS if len(names) == len(_CONTROLS) else ("", " (guessing)")
        columns += [(title, control) for control in controls]
    return columns
