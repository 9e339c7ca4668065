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
    """Write ``results.md`` and, with matplotlib, a figure.

    Args:
        results: Of the cells ``before`` and ``<places>/<fraction>``.
        output: The folder.

    Returns:
        The text of ``results.md``.
    """
    looks = {name: read_look(found) for name, found in results.found.items()}
    rows = [(_labels(name), look) for name, look in looks.items()]
    parts = [looks_table("Noise on some weights", rows, ("places", "weights"))] if rows else []
    curves = len(looks) > 1 and _BEFORE in looks
    figures = {"perturbation": partial(draw_perturbation, looks)} if curves else {}
    return write_study("\n\n".join([*parts, results.footer]), figures, output)


def draw_perturbation(looks: Mapping[str, Look]) -> Figure:
    """Draw attack success and perplexity against the share of the weights that were perturbed.

    Args:
        looks: By cell, ``before`` among them: a line across.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    figure = new_figure(11, 4)
    attacks, answers = figure.subplots(1, 2)
    before = looks[_BEFORE]
    places = dict.fromkeys(name.split("/")[0] for name in looks if name != _BEFORE)
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
    attacks.axhline(before.first().value, color=LIGHT.quiet, linewidth=1, linestyle="--", label="without noise")
    answers.axhline(before.perplexity[0], color=LIGHT.quiet, linewidth=1, linestyle="--", label="without noise")
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
    return place, f"{100 * float(fraction):g} %" if fraction else ""
