# SPDX-License-Identifier: Apache-2.0
"""The report's summary: tables of values with their intervals and controls, and what they come to in sentences."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from lightning_safety.report.checks import Point, control_of, find_metric, series, without_controls
from lightning_safety.report.measures import Measure
from lightning_safety.report.panels import NOT_DRAWN
from lightning_safety.report.run import RunRecord
from lightning_safety.report.words import label, label_in_sentence, meaning, number

CONTROL = "random mask"
_MAIN = ("attack_success_rate", "over_refusal_rate")


@dataclass(frozen=True)
class Cell:
    """A value and what is said below it."""

    measure: Measure | None
    notes: tuple[str, ...] = ()

    @property
    def bar(self) -> tuple[float, float, float] | None:
        """Where value, lower end and width of a rate's interval lie, in percent of [0, 1]; None for other values."""
        one = self.measure
        if one is None or not one.is_rate or one.value is None or one.low is None or one.high is None:
            return None
        low, high, value = (100 * min(1.0, max(0.0, part)) for part in (one.low, one.high, one.value))
        return round(value, 1), round(low, 1), round(max(0.0, high - low), 1)


@dataclass(frozen=True)
class Row:
    """A metric."""

    title: str
    meaning: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Table:
    """A table with a row for each metric.

    Attributes:
        title: What it shows.
        columns: Their titles.
        rows: Its rows.
        footnotes: Sentences below it.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    footnotes: tuple[str, ...] = field(default=())


def summary_tables(runs: Sequence[RunRecord]) -> list[Table]:
    """Return the tables of one run, or of several with one column a run."""
    if len(runs) > 1:
        found = [_evaluations_of_several(runs), _checks_of_several(runs)]
    else:
        found = [_evaluations_of_one(runs[0]), _checks_of_one(runs[0])]
    return [table for table in found if table.rows]


def _row(metric: str, cells: Sequence[Cell]) -> Row:
    return Row(label(metric), meaning(metric), tuple(cells))


def _metrics(columns: Sequence[Mapping[str, Measure]]) -> list[str]:
    return list(dict.fromkeys(metric for column in columns for metric in column))


def _evaluations_of_one(run: RunRecord) -> Table:
    columns = list(run.evaluations.values())
    rows = [_row(metric, [Cell(column.get(metric)) for column in columns]) for metric in _metrics(columns)]
    return Table("Evaluation", tuple(run.evaluations), tuple(rows), run.judged)


def _evaluations_of_several(runs: Sequence[RunRecord]) -> Table:
    after = [_after(run) for run in runs]
    rows = []
    for metric in _metrics([run.evaluations[name] for run, name in zip(runs, after, strict=True) if name]):
        cells = []
        for run, name in zip(runs, after, strict=True):
            others = {other: column[metric] for other, column in run.evaluations.items() if metric in column}
            own = others.pop(name, None) if name else None
            cells.append(Cell(own, tuple(f"{other}: {one}" for other, one in others.items())))
        rows.append(_row(metric, cells))
    judged = dict.fromkeys(sentence for run in runs for sentence in run.judged)
    return Table("Evaluation after training", tuple(run.name for run in runs), tuple(rows), tuple(judged))


def _after(run: RunRecord) -> str | None:
    """Return the column of a run's results that stands for it."""
    names = [name for name in run.evaluations if name != CONTROL]
    return "after" if "after" in names else names[-1] if names else None


def _checks_of_one(run: RunRecord) -> Table:
    found = run.series
    steps = sorted({point.step for points in found.values() for point in points})
    columns = [f"step {step}" for step in dict.fromkeys([*steps[:1], *steps[-1:]])]
    if len(columns) == 2:
        columns = [f"first check, {columns[0]}", f"last check, {columns[1]}"]
    control, last = run.control_series, [f"{CONTROL}, last check"] if run.control_series else []
    stages = {
        stage: series(check for check in run.checks if check.stage == stage)
        for stage in dict.fromkeys(check.stage for check in run.checks if check.stage != "fit")
    }
    rows = []
    for metric in _in_order([*found, *(name for one in stages.values() for name in one)]):
        cells = [_cell(found, metric, place, steps) for place in (0, -1)[: len(columns)]]
        if metric in run.budgets and cells:
            cells[-1] = Cell(cells[-1].measure, (*cells[-1].notes, f"budget line: {number(run.budgets[metric])}"))
        cells += [_cell(control, metric, -1, steps)] * len(last)
        cells += [_cell(one, metric, -1, []) for one in stages.values()]
        rows.append(_row(metric, cells))
    return Table("Checks during training", (*columns, *last, *stages), tuple(rows))


def _checks_of_several(runs: Sequence[RunRecord]) -> Table:
    rows = []
    steps = [max((points[-1].step for points in run.series.values()), default=0) for run in runs]
    for metric in _in_order(name for run in runs for name in run.series):
        cells = []
        for run, step in zip(runs, steps, strict=True):
            points = run.series.get(metric, [])
            cell = _cell(run.series, metric, -1, [step])
            first = (f"step {points[0].step}: {points[0].measure}",) if len(points) > 1 else ()
            budget = (f"budget line: {number(run.budgets[metric])}",) if metric in run.budgets else ()
            cells.append(Cell(cell.measure, (*cell.notes, *first, *budget)))
        rows.append(_row(metric, cells))
    columns = [f"{run.name}, step {step}" if run.series else run.name for run, step in zip(runs, steps, strict=True)]
    return Table("Last check during training", tuple(columns), tuple(rows))


def _in_order(metrics: Iterable[str]) -> list[str]:
    """Return metrics once each, without controls, those of one kind together, what watching costs last."""
    names = without_controls(list(dict.fromkeys(metrics)))
    bases = list(dict.fromkeys(name.partition("/")[0] for name in names))
    return sorted(names, key=lambda name: (name.partition("/")[0] in NOT_DRAWN, bases.index(name.partition("/")[0])))


def _cell(found: Mapping[str, list[Point]], metric: str, place: int, steps: Sequence[int]) -> Cell:
    """Return the cell of a metric's first or last point, with its random control, and its step if not the column's."""
    points, chance = found.get(metric), found.get(control_of(metric, found) or "", [])
    if not points:
        return Cell(None)
    point = points[place]
    by_step = {one.step: one.measure for one in chance}
    notes = [] if steps and point.step == steps[place] else [f"at step {point.step}"]
    if point.step in by_step:
        notes.append(f"by chance: {by_step[point.step]}")
    return Cell(point.measure, tuple(notes))


def sentences(run: RunRecord) -> list[str]:
    """Return what happened, in sentences: how safety and usefulness changed, and by which budget."""
    said = [_outcome(run)] if _outcome(run) else []
    columns = run.evaluations
    if "before" in columns and "after" in columns:
        before, after = columns["before"], columns["after"]
        for metric in [metric for metric in _MAIN if metric in before and metric in after]:
            said.append(_change(label_in_sentence(metric), before[metric], after[metric], "before", "after"))
    else:
        names = [find_metric(run.series, metric) for metric in _MAIN]
        for name in [name for name in names if name is not None] or list(run.series)[:1]:
            points = run.series[name]
            if len(points) > 1:
                first, last = points[0], points[-1]
                whens = (f"at step {first.step}", f"at step {last.step}")
                said.append(_change(label_in_sentence(name), first.measure, last.measure, *whens))
    for name, limit in run.budgets.items():
        over = [p for p in run.series[name] if p.measure.value is not None and p.measure.value > limit]
        crossed = f"first rose above it at step {over[0].step} ({over[0].measure})" if over else "never rose above it"
        said.append(
            f"The budget’s line for {label_in_sentence(name)} is {number(limit)}; the rate {crossed}. SafetyBudget acts"
            " on a test of each prompt before and after, not on this line."
        )
    return said


def _change(name: str, first: Measure, last: Measure, before: str, after: str) -> str:
    if first == last:
        return f"{name} was {first} {before} and {after}."
    overlap = first.overlaps(last)
    told = {None: "", True: "; the intervals overlap", False: "; the intervals do not overlap"}[overlap]
    return f"{name} went from {first} {before} to {last} {after}{told}."


def _outcome(run: RunRecord) -> str:
    outcome = run.settings.get("outcome")
    if not isinstance(outcome, dict) or not isinstance(outcome.get("step"), int):
        return ""
    if isinstance(outcome.get("exception"), str):
        return (
            f"The fit was ended by {outcome['exception']} at step {outcome['step']}; this is what there was until then."
        )
    trainer = run.settings.get("trainer")
    planned = trainer.get("max_steps") if isinstance(trainer, dict) else None
    of = f" of {planned}" if isinstance(planned, int) and planned > 0 else ""
    return f"The fit finished at step {outcome['step']}{of}."


def against_chance(run: RunRecord) -> list[str]:
    """Return, for each rate of a study, how the result stands to that of a random mask of the same size."""
    after, control = run.evaluations.get("after", {}), run.evaluations.get(CONTROL, {})
    said = []
    for metric in after:
        overlap = after[metric].overlaps(control[metric]) if metric in control else None
        if overlap is not None and metric != "unscored_rate":
            told = (
                "the intervals overlap: this run does not tell them apart"
                if overlap
                else "the intervals do not overlap"
            )
            said.append(f"{label(metric)}: {after[metric]} after, {control[metric]} with a random mask; {told}.")
    return said
