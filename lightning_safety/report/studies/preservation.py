# SPDX-License-Identifier: Apache-2.0
"""Safety against what keeping it costs: the tables and the figure of a study of several ways to keep it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_safety.drawing import new_figure
from lightning_safety.report.colours import LIGHT
from lightning_safety.report.studies.looks import MISSING, Look, arm_style, error_bars, looks_table, read_look
from lightning_safety.report.studies.reading import StudyResults, write_study

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PLAIN = "plain"
"""The arm that the others are compared with."""

_COSTS = ("perplexity of the task's answers", "extra training time, preparation included")


@dataclass(frozen=True)
class Point:
    """What one arm came to, after one number of steps on one kind of data.

    Attributes:
        arm: Its name.
        step: After how many optimizer steps.
        look: What was seen then.
        extra_time: Seconds of training over those of the plain arm, less 1; where that has none, seconds of rehearsals
            over those of the rest; None where neither is known.
        share: Rehearsals per optimizer step; None where there is no rehearsal.
    """

    arm: str
    step: int
    look: Look
    extra_time: float | None
    share: float | None


def write_preservation(results: StudyResults, output: Path) -> str:
    """Write ``results.md`` and, with matplotlib, a figure for each kind of training.

    Args:
        results: Of the cells ``before`` and ``<training>/<data>/<arm>``.
        output: The folder.

    Returns:
        The text of ``results.md``.
    """
    groups = _groups(results.found)
    before = _points({"before": results.found["before"]})[0] if "before" in results.found else None
    parts = [_table(title, points, before) for title, points in groups.items()]
    figures = {}
    for training in dict.fromkeys(title.split("/")[0] for title in groups):
        shown = {title: points for title, points in groups.items() if title.split("/")[0] == training}
        figures[f"front-{training}"] = partial(draw_front, shown, before)
    return write_study("\n\n".join([*parts, results.footer]), figures, output)


def draw_front(groups: Mapping[str, Sequence[Point]], before: Point | None) -> Figure:
    """Draw attack success, with its interval, against task perplexity and against extra time.

    Args:
        groups: The points by title, one row of the figure each; of several steps the last.
        before: The start model: a line across.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    arms = list(dict.fromkeys(point.arm for points in groups.values() for point in points))
    figure = new_figure(12, 3.6 * len(groups) + 0.6)
    for row, (title, points) in zip(figure.subplots(len(groups), 2, squeeze=False), groups.items(), strict=True):
        last = max(point.step for point in points)
        for axes, label in zip(row, _COSTS, strict=True):
            for point in points:
                place = point.look.perplexity[0] if axes is row[0] else point.extra_time
                if point.step == last and place is not None:
                    _draw_point(axes, place, point, arms.index(point.arm))
            if before is not None:
                axes.axhline(before.look.first().value, color=LIGHT.quiet, linewidth=1, linestyle="--", label="before")
            axes.set_ylim(0, 1)
            axes.set_xlabel(label)
            axes.grid(color=LIGHT.line, linewidth=0.6)
        row[1].xaxis.set_major_formatter(lambda share, _: f"{100 * share:.0f} %")
        row[0].set_ylabel("attack success")
        row[0].set_title(f"{title}, {last} steps", fontsize=10, loc="left")
        # Without a plain arm there is no extra time, and nothing in the panel on the right.
        handles, names = row[0].get_legend_handles_labels()
        row[1].legend(handles, names, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _draw_point(axes: Any, place: float, point: Point, number: int) -> None:
    rate = point.look.first()
    axes.errorbar(
        place,
        rate.value,
        yerr=error_bars(rate),
        # No line: there is one point.
        linestyle="none",
        elinewidth=1,
        label=point.arm,
        **arm_style(number, point.arm),
    )


def _groups(results: Mapping[str, Any]) -> dict[str, list[Point]]:
    found: dict[str, dict[str, Any]] = {}
    for name, result in results.items():
        title, _, arm = name.rpartition("/")
        if title:
            found.setdefault(title, {})[arm] = result
    return {title: _points(by_arm) for title, by_arm in found.items()}


def _points(by_arm: Mapping[str, Any]) -> list[Point]:
    plain = {look["step"]: look["training_seconds"] for look in by_arm.get(PLAIN, {"looks": []})["looks"]}
    points = []
    for arm, result in by_arm.items():
        for look in result["looks"]:
            seconds, step = look["training_seconds"], look["step"]
            share, own = (look["metrics"].get(f"safety/rehearsal_{of}") for of in ("share", "seconds"))
            extra = None
            # Seconds are taken out of a cell beside which something else ran.
            if seconds is not None and plain.get(step):
                extra = seconds / plain[step] - 1
            elif seconds is not None and own is not None:
                extra = own / (seconds - own)
            points.append(Point(arm, step, read_look(look), extra, share))
    return points


def _table(title: str, points: Sequence[Point], before: Point | None) -> str:
    rows = [*([before] if before is not None else []), *points]
    return looks_table(
        title,
        [((point.arm, str(point.step)), point.look) for point in rows],
        ("", "steps"),
        [
            (
                "extra time, preparation included",
                [MISSING if point.extra_time is None else f"{100 * point.extra_time:+.0f} %" for point in rows],
            ),
            ("rehearsals a step", [MISSING if point.share is None else f"{point.share:.2f}" for point in rows]),
        ],
    )
