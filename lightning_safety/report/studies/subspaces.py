# SPDX-License-Identifier: Apache-2.0
"""What is left of safety and usefulness when updates are projected into alignment's directions and out of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_safety.drawing import new_figure
from lightning_safety.monitoring.table import markdown_table
from lightning_safety.report.colours import LIGHT
from lightning_safety.report.studies.looks import MISSING, Look, looks_table, read_look
from lightning_safety.report.studies.reading import StudyResults, write_study

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ALIGNED, _OVERLAPS, _WHOLE = "aligned", "overlaps", "whole"
_STYLES = {"parallel": "-", "orthogonal": "--", "opposite": ":"}


@dataclass(frozen=True)
class Projected:
    """One update, whole or projected.

    Attributes:
        directions: ``top``, ``random`` or ``random_own``; empty for the whole update.
        kind: ``parallel``, ``orthogonal`` or ``opposite``.
        fraction: Of the directions of each matrix.
        energy_kept: The share of the update's energy that was kept.
        capped: In how many matrices alignment changed fewer directions than that, and in how many it is asked; empty
            for the whole update.
        look: What was seen of the model.
    """

    directions: str
    kind: str
    fraction: float
    energy_kept: float
    capped: str
    look: Look


def write_subspaces(results: StudyResults, output: Path) -> str:
    """Write ``results.md`` and, with matplotlib, a figure for each update.

    Args:
        results: Of the cells ``aligned``, ``overlaps``, ``<update>/whole`` and
            ``<update>/<directions>-<kind>-<fraction>``.
        output: The folder.

    Returns:
        The text of ``results.md``.
    """
    aligned = read_look(results.found[_ALIGNED]) if _ALIGNED in results.found else None
    by_update: dict[str, list[Projected]] = {}
    for name, found in results.found.items():
        update, _, cell = name.partition("/")
        if cell:
            by_update.setdefault(update, []).append(_read(cell, found))
    parts = [_table(update, aligned, projected) for update, projected in by_update.items()]
    if _OVERLAPS in results.found:
        parts.append(_overlaps(results.found[_OVERLAPS]["pairs"]))
    figures = {
        f"projected-{update}": partial(draw_projected, aligned, projected)
        for update, projected in by_update.items()
        if any(one.kind for one in projected)
    }
    return write_study("\n\n".join([*parts, results.footer]), figures, output)


def draw_projected(aligned: Look | None, projected: Sequence[Projected]) -> Figure:
    """Draw attack success, perplexity and energy kept against the share of the directions.

    Args:
        aligned: The model before the update: a dashed line across.
        projected: One update, whole (a line across) and projected.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    figure = new_figure(14, 4)
    panels = figure.subplots(1, 3)
    curves = list(dict.fromkeys((one.directions, one.kind) for one in projected if one.kind))
    names = list(dict.fromkeys(directions for directions, _ in curves))
    for axes, (title, value) in zip(panels, _PANELS.items(), strict=True):
        for directions, kind in curves:
            points = sorted(
                (one.fraction, value(one)) for one in projected if (one.directions, one.kind) == (directions, kind)
            )
            axes.plot(
                [fraction for fraction, _ in points],
                [height for _, height in points],
                _STYLES[kind],
                marker="o",
                color=LIGHT.series[names.index(directions) % len(LIGHT.series)],
                # Controls are hollow.
                markerfacecolor=None if directions == "top" else "white",
                label=f"{directions}, {kind}",
            )
        for one in projected:
            if not one.kind:
                axes.axhline(value(one), color=LIGHT.limit, linewidth=1, label="whole update")
        if aligned is not None and title != "energy kept":
            before = Projected("", "", 0.0, 0.0, "", aligned)
            axes.axhline(value(before), color=LIGHT.quiet, linewidth=1, linestyle="--", label="aligned")
        axes.set_xlabel("share of the directions")
        axes.set_ylabel(title)
        axes.grid(color=LIGHT.line, linewidth=0.6)
    panels[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


_PANELS: dict[str, Callable[[Projected], float]] = {
    "attack success": lambda one: one.look.first().value,
    "perplexity of answers": lambda one: one.look.perplexity[0],
    "energy kept": lambda one: one.energy_kept,
}


def _read(cell: str, found: Mapping[str, Any]) -> Projected:
    if cell == _WHOLE:
        return Projected("", "", 1.0, 1.0, "", read_look(found))
    directions, kind, fraction = cell.split("-", maxsplit=2)
    capped = f"{found['capped']} of {found['matrices']}"
    return Projected(directions, kind, float(fraction), found["energy_kept"], capped, read_look(found))


def _table(update: str, aligned: Look | None, projected: Sequence[Projected]) -> str:
    before = [] if aligned is None else [(("aligned, no update", "", "", MISSING), aligned)]
    rows = [
        (
            (
                f"{one.kind}, {one.directions}" if one.kind else "whole update",
                f"{one.fraction:g}" if one.kind else "",
                one.capped,
                f"{one.energy_kept:.3f}",
            ),
            one.look,
        )
        for one in projected
    ]
    return looks_table(
        f"Update: {update}", [*before, *rows], ("part", "of the directions", "matrices with fewer", "energy kept")
    )


def _overlaps(pairs: Mapping[str, Sequence[Mapping[str, float | None]]]) -> str:
    energies = [row["energy"] for row in next(iter(pairs.values()))]
    lines = [["overlap of updates (of random subspaces)", *(f"energy {energy:g}" for energy in energies)]]
    for pair, rows in pairs.items():
        lines.append([pair.replace(" | ", " and "), *(_overlap(row) for row in rows)])
    return "\n".join(["### What updates have in common", "", *markdown_table(lines)])


def _overlap(row: Mapping[str, float | None]) -> str:
    if row["overlap"] is None:
        return MISSING
    return f"{row['overlap']:.3f} ({row['overlap_random']:.3f})"
