# SPDX-License-Identifier: Apache-2.0
"""Which curves stand together in a figure, and what the figure says in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from lightning_safety.report.checks import Point, control_of, without_controls
from lightning_safety.report.run import RunRecord
from lightning_safety.report.words import is_rate, label, meaning, number

NOT_DRAWN = ("check_seconds", "held_fraction")
_UTILITY = "_utility"  # Of one run, what is measured with both kinds of subspaces stands in one figure.


@dataclass(frozen=True)
class Line:
    """A curve.

    Attributes:
        name: What the legend calls it; a run or a judge.
        points: Its points.
        colour: Its place in the list of colours.
        control: Whether it shows what chance does.
    """

    name: str
    points: tuple[Point, ...]
    colour: int
    control: bool = False

    @property
    def words(self) -> str:
        """The curve in words, with its numbers."""
        measured = [point for point in self.points if point.measure.value is not None]
        if not measured:
            return f"{self.name}: nothing could be measured"
        first, last = measured[0], measured[-1]
        said = [f"{first.measure} at step {first.step}"]
        if last is not first:
            said.append(f"{last.measure} at step {last.step}")
        highest = max(measured, key=lambda point: point.measure.value or 0.0)
        lowest = min(measured, key=lambda point: point.measure.value or 0.0)
        for name, point in (("highest", highest), ("lowest", lowest)):
            if point not in (first, last) and point.measure.value not in (first.measure.value, last.measure.value):
                said.append(f"{name} {point.measure.number} at step {point.step}")
        gaps = len(self.points) - len(measured)
        missing = f", {gaps} without a value" if gaps else ""
        count = f"{len(self.points)} check{'' if len(self.points) == 1 else 's'}{missing}"
        return f"{self.name}: {', '.join(said)} ({count})"


@dataclass(frozen=True)
class Panel:
    """A figure of curves over optimizer steps.

    Attributes:
        title: What it shows.
        meaning: What that measures.
        lines: The curves.
        limits: The budgets of the curves, by the name of the run or judge.
        is_rate: Whether the values are shares, between 0 and 1.
    """

    title: str
    meaning: str
    lines: tuple[Line, ...]
    limits: dict[str, float] = field(default_factory=dict)
    is_rate: bool = False

    @property
    def words(self) -> str:
        """The figure in words, with its numbers."""
        budgets = [f"Budget for {name}: at most {number(limit)}" for name, limit in self.limits.items()]
        intervals = any(point.measure.interval for line in self.lines for point in line.points)
        note = ["Brackets: 95 % intervals, drawn as bands"] if intervals else []
        said = [f"{self.title} over optimizer steps", *(line.words for line in self.lines), *budgets, *note]
        return f"{'. '.join(said)}."


def panels(runs: Sequence[RunRecord]) -> list[Panel]:
    """Return the figures of one run, or of several beside each other.

    One run: a figure for each metric, with a curve for each judge or subspace. Several runs: a figure for each of
    these, with a curve for each run. A metric's random control is a dashed curve in the metric's own figure, and so is
    the fit with a random mask.

    Args:
        runs: The runs.
    """
    names = list(dict.fromkeys(name for run in runs for name in run.series))
    shown = [name for name in without_controls(names) if name.partition("/")[0] not in NOT_DRAWN]
    if len(runs) == 1:
        groups: dict[str, list[str]] = {}
        for name in shown:
            groups.setdefault(name.partition("/")[0].removesuffix(_UTILITY), []).append(name)
        return [_of_one_run(runs[0], base, members) for base, members in groups.items()]
    return [_of_several_runs(runs, name) for name in shown]


def _of_one_run(run: RunRecord, base: str, names: list[str]) -> Panel:
    lines, limits = [], {}
    for colour, name in enumerate(names):
        detail = name.partition("/")[2] or ("this run" if len(names) == 1 else _subspace(name))
        lines.append(Line(detail, tuple(run.series[name]), colour))
        lines += _controls(run, name, "" if len(names) == 1 else f", {detail}", colour)
        if name in run.budgets:
            limits[detail] = run.budgets[name]
    title = label(names[0] if len(names) == 1 else base)
    return Panel(title, meaning(base), tuple(lines), limits, is_rate(base))


def _subspace(name: str) -> str:
    return "utility subspace" if name.endswith(_UTILITY) else "safety subspace"


def _of_several_runs(runs: Sequence[RunRecord], name: str) -> Panel:
    lines, limits = [], {}
    for colour, run in enumerate(runs):
        if name in run.series:
            lines.append(Line(run.name, tuple(run.series[name]), colour))
            lines += _controls(run, name, f", {run.name}", colour)
        if name in run.budgets:
            limits[run.name] = run.budgets[name]
    return Panel(label(name), meaning(name), tuple(lines), limits, is_rate(name))


def _controls(run: RunRecord, name: str, of: str, colour: int) -> list[Line]:
    found = []
    control = control_of(name, run.series)
    if control is not None:
        found.append(Line(f"by chance{of}", tuple(run.series[control]), colour, control=True))
    if name in run.control_series:
        found.append(Line(f"random mask{of}", tuple(run.control_series[name]), colour, control=True))
    return found
