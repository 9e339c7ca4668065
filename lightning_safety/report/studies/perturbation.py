# SPDX-License-Identifier: Apache-2.0
"""Noise on weights of highest, random and lowest score, and what it does to safety and usefulness."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_safety.drawing import new_figure
from lightning_safety.report.colours import LIGHT
from lightning_safety.report.studies.looks import Look, error_bars, looks_table, read_look
from lightning_safety.report.studies.reading import StudyResults, write_study

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BEFORE = "before"


def write_perturbation(results: StudyResults, output: Path) -> str:
    """Write ``results.md`` and, with matplotlib, a figure for each strength of the noise.

    Args:
        results: Of the cells ``before`` and ``<standard deviations>/<places>/<fraction>``.
        output: The folder.

    Returns:
        The text of ``results.md``.
    """
    before = read_look(results.found[_BEFORE]) if _BEFORE in results.found else None
    by_noise: dict[str, dict[str, Look]] = {}
    for name, found in results.found.items():
        noise, _, cell = name.partition("/")
        if cell:
            by_noise.setdefault(noise, {})[cell] = read_look(found)
    start = [] if before is None else [(("before", ""), before)]
    parts = [
        looks_table(
            f"Noise of {noise} standard deviations",
            [*start, *((_labels(name), look) for name, look in looks.items())],
            ("places", "weights"),
        )
        for noise, looks in by_noise.items()
    ]
    figures = {f"noise-{noise}": partial(draw_perturbation, looks, before) for noise, looks in by_noise.items()}
    return write_study("\n\n".join([*parts, results.footer]), figures, output)


def draw_perturbation(looks: Mapping[str, Look], before: Look | None) -> Figure:
    """Draw attack success and perplexity against the share of the weights that were perturbed.

    Args:
        looks: By ``<places>/<fraction>``.
        before: The model without noise: a line across.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    figure = new_figure(11, 4)
    attacks, answers = figure.subplots(1, 2)
    places = dict.fromkeys(name.split("/")[0] for name in looks)
    for colour, place in zip(LIGHT.series, places, strict=False):
        of = {float(name.split("/")[1]): look for name, look in looks.items() if name.split("/")[0] == place}
        fractions = sorted(of)
        shares = [f"{100 * fraction:g}" for fraction in fractions]
        rates = [of[fraction].first() for fraction in fractions]
        bars = [error_bars(rate) for rate in rates]
        attacks.errorbar(
            shares,
            [rate.value for rate in rates],
            yerr=[[bar[side][0] for bar in bars] for side in (0, 1)],
            color=colour,
            marker="o",
            # Controls are hollow.
            markerfacecolor="white" if place == "random" else colour,
            label=place,
        )
        values = [of[fraction].perplexity[0] for fraction in fractions]
        answers.plot(shares, values, color=colour, marker="o", label=place)
    if before is not None:
        for axes, value in ((attacks, before.first().value), (answers, before.perplexity[0])):
            axes.axhline(value, color=LIGHT.quiet, linewidth=1, linestyle="--", label="without noise")
    attacks.set_ylim(0, 1)
    if all(math.isfinite(look.perplexity[0]) for look in looks.values()):
        answers.set_yscale("log")
    for axes, label in ((attacks, "attack success"), (answers, "perplexity of answers")):
        axes.set_xlabel("weights with noise, % of the scored ones")
        axes.set_ylabel(label)
        axes.grid(color=LIGHT.line, linewidth=0.6)
        axes.legend(fontsize=8)
    return figure


def _labels(name: str) -> tuple[str, str]:
    place, _, fraction = name.partition("/")
    return place, f"{100 * float(fraction):g} %"
