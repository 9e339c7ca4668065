# SPDX-License-Identifier: Apache-2.0
"""Safety against what keeping it costs: the tables and the figure of a study of several ways to keep it."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_safety.drawing import has_matplotlib, new_figure
from lightning_safety.files import replace_atomically
from lightning_safety.monitoring.rates import Rate
from lightning_safety.monitoring.table import markdown_table
from lightning_safety.report.colours import LIGHT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PLAIN = "plain"
"""The arm that the others are compared with."""

_RATES = {"attack_success_rate": "attack success", "over_refusal_rate": "over-refusal"}
_COSTS = ("perplexity of the task's answers", "extra training time, preparation included")
_MARKERS = "osD^vPX*"
_MISSING = "–"


@dataclass(frozen=True)
class Point:
    """What one arm came to, after one number of steps on one kind of data.

    Attributes:
        arm: Its name.
        step: After how many optimizer steps.
        rates: By judge, then by name.
        perplexity: Of the task's answers: value, low, high.
        extra_time: Seconds of training over those of the plain arm, less 1; None without one.
        share: Rehearsals per optimizer step; None where there is no rehearsal.
    """

    arm: str
    step: int
    rates: Mapping[str, Mapping[str, Rate]]
    perplexity: tuple[float, float, float]
    extra_time: float | None
    share: float | None


def write_front(results: Mapping[str, Any], missing: Mapping[str, float], output: str | os.PathLike[str]) -> str:
    """Write ``results.md`` and, with matplotlib, a figure for each kind of training.

    Args:
        results: What cells found, by name: ``before`` and ``<training>/<data>/<arm>``; None for those not run.
        missing: The cells not run, and what they would take, in seconds.
        output: The folder.

    Returns:
        The text of ``results.md``.
    """
    groups = _groups(results)
    before = _points({"before": results["before"]})[0] if results.get("before") else None
    parts = [_table(title, points, before) for title, points in groups.items()]
    if missing:
        parts.append(_not_run(missing))
    text = "\n\n".join(parts) + "\n"
    with replace_atomically(Path(output) / "results.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    if has_matplotlib():
        for training in dict.fromkeys(title.split("/")[0] for title in groups):
            figure = draw_front({t: p for t, p in groups.items() if t.split("/")[0] == training}, before)
            with replace_atomically(Path(output) / f"front-{training}.png") as temporary:
                figure.savefig(temporary, format="png")
    return text


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
                place = point.perplexity[0] if axes is row[0] else point.extra_time
                if point.step == last and place is not None:
                    _draw_point(axes, place, point, arms.index(point.arm))
            if before is not None:
                axes.axhline(_first(before).value, color=LIGHT.quiet, linewidth=1, linestyle="--", label="before")
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
    rate = _first(point)
    low, high = rate.interval
    control = "random" in point.arm
    colour = LIGHT.series[number % len(LIGHT.series)]
    axes.errorbar(
        place,
        rate.value,
        yerr=[[rate.value - low], [high - rate.value]],
        fmt=_MARKERS[number // len(LIGHT.series) % len(_MARKERS)],
        color=colour,
        # Controls are hollow.
        markerfacecolor="white" if control else colour,
        linewidth=1,
        label=point.arm,
    )


def _first(point: Point) -> Rate:
    return next(iter(point.rates.values()))["attack_success_rate"]


def _groups(results: Mapping[str, Any]) -> dict[str, list[Point]]:
    found: dict[str, dict[str, Any]] = {}
    for name, result in results.items():
        title, _, arm = name.rpartition("/")
        if title and result is not None:
            found.setdefault(title, {})[arm] = result
    return {title: _points(by_arm) for title, by_arm in found.items()}


def _points(by_arm: Mapping[str, Any]) -> list[Point]:
    plain = {look["step"]: look["training_seconds"] for look in by_arm.get(PLAIN, {"looks": []})["looks"]}
    points = []
    for arm, result in by_arm.items():
        for look in result["looks"]:
            seconds, step = look["training_seconds"], look["step"]
            points.append(
                Point(
                    arm,
                    step,
                    {judge: _read_rates(rates) for judge, rates in look["rates"].items()},
                    tuple(_number(look["perplexity"][key]) for key in ("value", "low", "high")),  # type: ignore[arg-type]
                    seconds / plain[step] - 1 if plain.get(step) else None,
                    look["metrics"].get("safety/rehearsal_share"),
                )
            )
    return points


def _read_rates(rates: Mapping[str, Any]) -> dict[str, Rate]:
    return {name: Rate(rate["successes"], rate["scored"], rate["total"]) for name, rate in rates.items()}


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _not_run(missing: Mapping[str, float]) -> str:
    arms: dict[str, list[str]] = {}
    hours: dict[str, float] = {}
    for name, seconds in missing.items():
        title, _, arm = name.rpartition("/")
        arms.setdefault(title, []).append(arm)
        hours[title] = hours.get(title, 0.0) + seconds / 3600
    lines = [f"- {title}: {', '.join(names)} ({hours[title]:.2f} h)" for title, names in arms.items()]
    return "\n".join(["Not run, with the hours they would take, estimated:", "", *lines])


def _table(title: str, points: Sequence[Point], before: Point | None) -> str:
    rows = [*([before] if before is not None else []), *points]
    judges = list(points[0].rates)
    heading = ["", "steps"]
    heading += [f"{words}, {judge}" for words in _RATES.values() for judge in judges]
    heading += [_COSTS[0], "extra time, preparation included", "rehearsals a step"]
    lines = [heading]
    for point in rows:
        line = [point.arm, str(point.step)]
        line += [str(point.rates[judge][name]) for name in _RATES for judge in judges]
        value, low, high = point.perplexity
        line.append(f"{value:.2f} [{low:.2f}, {high:.2f}]")
        line.append(_MISSING if point.extra_time is None else f"{100 * point.extra_time:+.0f} %")
        line.append(_MISSING if point.share is None else f"{point.share:.2f}")
        lines.append(line)
    return "\n".join([f"### {title}", "", *markdown_table(lines)])
