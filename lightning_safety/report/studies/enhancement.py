# SPDX-License-Identifier: Apache-2.0
"""Attack success against over-refusal, for weights of highest score, controls and all weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_safety.drawing import new_figure
from lightning_safety.report.colours import LIGHT
from lightning_safety.report.studies.looks import Look, arm_style, looks_table, read_look
from lightning_safety.report.studies.reading import StudyResults, write_study

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BEFORE = "before"


def write_enhancement(results: StudyResults, output: Path) -> str:
    """Write ``results.md`` and, with matplotlib, a figure for each seed.

    Args:
        results: Of the cells ``before`` and ``<seed>/<arm>``.
        output: The folder.

    Returns:
        The text of ``results.md``.
    """
    before = results.found.get(_BEFORE)
    start = [(("before", "0"), read_look(before["looks"][0]))] if before else []
    by_seed: dict[str, dict[str, list[tuple[int, Look]]]] = {}
    for name, found in results.found.items():
        seed, _, arm = name.rpartition("/")
        if seed:
            by_seed.setdefault(seed, {})[arm] = [(look["step"], read_look(look)) for look in found["looks"]]
    parts = []
    for seed, arms in by_seed.items():
        rows = [((arm, str(step)), look) for arm, looks in arms.items() for step, look in looks]
        parts.append(looks_table(seed.replace("-", " "), [*start, *rows], ("trained weights", "steps")))
    first = start[0][1] if start else None
    figures = {f"front-{seed}": partial(draw_enhancement, arms, first) for seed, arms in by_seed.items()}
    return write_study("\n\n".join([*parts, results.footer]), figures, output)


def draw_enhancement(arms: Mapping[str, Sequence[tuple[int, Look]]], before: Look | None) -> Figure:
    """Draw attack success against over-refusal, a line from each arm's first look to its last, a panel for each judge.

    Args:
        arms: The looks of each, with their steps.
        before: The start model.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    judges = list(next(iter(arms.values()))[0][1].rates)
    figure = new_figure(5.5 * len(judges) + 1, 4.5)
    for axes, judge in zip(figure.subplots(1, len(judges), squeeze=False)[0], judges, strict=True):
        for number, (arm, looks) in enumerate(arms.items()):
            rates: list[Mapping[str, Any]] = [look.rates[judge] for _, look in looks]
            style = arm_style(number, arm)
            axes.plot(
                [of["over_refusal_rate"].value for of in rates],
                [of["attack_success_rate"].value for of in rates],
                linewidth=1,
                label=arm,
                **style,
            )
            for (step, _), of in zip(looks, rates, strict=True):
                place = (of["over_refusal_rate"].value, of["attack_success_rate"].value)
                axes.annotate(
                    str(step), place, textcoords="offset points", xytext=(4, 3), fontsize=6, color=style["color"]
                )
        if before is not None:
            of = before.rates[judge]
            place = (of["over_refusal_rate"].value, of["attack_success_rate"].value)
            axes.plot(*place, marker="x", color=LIGHT.quiet, linestyle="", label="before")
        axes.set_xlabel("over-refusal")
        axes.set_ylabel("attack success")
        axes.set_title(judge, fontsize=10, loc="left")
        axes.grid(color=LIGHT.line, linewidth=0.6)
    figure.axes[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
