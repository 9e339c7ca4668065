# SPDX-License-Identifier: Apache-2.0
"""Reading ``safety.jsonl``: the checks of the last fit, and those of ``validate`` and ``test`` after it."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightning_safety.report.measures import Measure, measure
from lightning_safety.report.words import is_rate

PREFIX = "safety/"
_CONTROLS = ("_shuffled", "_random", "_chance")  # How the names of controls end, the most telling first.


@dataclass(frozen=True)
class Check:
    """One look of one monitor.

    Attributes:
        monitor: The monitor's class.
        run: What tells the monitor's runs apart.
        stage: ``"fit"``, ``"validate"`` or ``"test"``.
        step: The optimizer step.
        measures: What was found, by metric without ``safety/``.
    """

    monitor: str
    run: str
    stage: str
    step: int
    measures: dict[str, Measure]


@dataclass(frozen=True)
class Point:
    """The value of a metric at an optimizer step."""

    step: int
    measure: Measure


def read_lines(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """Return the objects of a JSON Lines file; what cannot be read is left out, with a note.

    A kill in the middle of writing cuts the last line short.
    """
    lines = path.read_bytes().decode("utf-8", errors="replace").split("\n")
    found: list[dict[str, Any]] = []
    broken = []
    for position, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = None
        if isinstance(entry, dict):
            found.append(entry)
        else:
            broken.append(position)
    if broken == [len(lines) - 1]:
        notes.append(f"The last line of {path.name} was cut short, as by a kill, and is left out.")
    elif broken:
        notes.append(f"{len(broken)} broken line(s) of {path.name} are left out.")
    return found


def read_checks(path: Path, notes: list[str]) -> list[Check]:
    """Return the checks of the last fit in a ``safety.jsonl``, and those of ``validate`` and ``test``.

    Args:
        path: The file.
        notes: What the reader should know is added here.
    """
    checks = [check for check in map(_check, read_lines(path, notes)) if check is not None]
    fits = _fits([check for check in checks if check.stage == "fit"])
    if len(fits) > 1:
        notes.append(f"{path.name} holds the checks of {len(fits)} fits; this page shows the last.")
    evaluations = {(check.stage, check.monitor): check for check in checks if check.stage != "fit"}
    return [*(fits[-1] if fits else []), *evaluations.values()]


def _check(line: dict[str, Any]) -> Check | None:
    step = line.get("step")
    # A line of another tool, which says nothing of a check, is no check.
    if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step < 2**53:
        return None
    rates = line.get("rates")
    rates = rates if isinstance(rates, dict) else {}
    measures: dict[str, Measure] = {}
    for key, value in line.items():
        name = key.removeprefix(PREFIX)
        found = measure(rates.get(name, value)) if key != name else None
        if found is not None:
            measures[name] = replace(found, is_rate=is_rate(name) or found.is_rate)
    # The plain name of a rate repeats the first judge's, which has the interval.
    judged = {name.partition("/")[0] for name in measures if "/" in name and is_rate(name)}
    measures = {name: one for name, one in measures.items() if name not in judged}
    identity = (str(line.get("monitor", "monitor")), str(line.get("run", "")), str(line.get("stage", "fit")))
    return Check(*identity, step, measures)


def _fits(checks: Sequence[Check]) -> list[list[Check]]:
    """Return the checks of each fit. Each monitor names its own run; those of one fit stand between each other."""
    spans: dict[str, list[int]] = {}
    for place, check in enumerate(checks):
        spans.setdefault(check.run, [place, place])[1] = place
    fits: list[list[str]] = []
    end = -1
    for run, (first, last) in spans.items():
        if first > end and (not fits or _begins_another_fit(checks, fits[-1], first)):
            fits.append([])
        fits[-1].append(run)
        end = max(end, last)
    return [sorted((check for check in checks if check.run in runs), key=lambda check: check.step) for runs in fits]


def _begins_another_fit(checks: Sequence[Check], runs: list[str], first: int) -> bool:
    """Whether a run whose lines come after all those of `runs` is of another fit: the same monitor, or steps anew."""
    before = [check for check in checks[:first] if check.run in runs]
    again = any(check.monitor == checks[first].monitor for check in before)
    return again or checks[first].step < max(check.step for check in before)


def series(checks: Iterable[Check]) -> dict[str, list[Point]]:
    """Return the points of each metric by step.

    A metric that several monitors log is told apart by the monitor, and so is the time a check took.

    Example:
        >>> checks = [Check(name, name, "fit", 0, {"check_seconds": Measure(1.0)}) for name in ("First", "Second")]
        >>> list(series(checks))
        ['check_seconds/First', 'check_seconds/Second']
    """
    checks = list(checks)
    runs: dict[str, dict[str, None]] = {}
    for check in checks:
        for name in check.measures:
            runs.setdefault(name, {})[check.run] = None
    monitors = {check.run: check.monitor for check in checks}
    found: dict[str, list[Point]] = {}
    for check in checks:
        for name, value in check.measures.items():
            among = list(runs[name])
            key = name
            if len(among) > 1 or name == "check_seconds":
                same = [run for run in among if monitors[run] == check.monitor]
                key += f"/{check.monitor}" + (f" {same.index(check.run) + 1}" if len(same) > 1 else "")
            found.setdefault(key, []).append(Point(check.step, value))
    return {name: _by_step(points) for name, points in found.items()}


def _by_step(points: list[Point]) -> list[Point]:
    """Return points in order, the last of those that have the same step."""
    return [point for _, point in sorted({point.step: point for point in points}.items())]


def find_metric(found: Iterable[str], metric: str) -> str | None:
    """Return the name that a metric has among those found; a plain name is the first judge's.

    Example:
        >>> find_metric(["refusal_rate/keyword_refusal", "refusal_margin"], "safety/refusal_rate")
        'refusal_rate/keyword_refusal'
    """
    name = metric.removeprefix(PREFIX)
    return next((other for other in found if other == name or other.startswith(f"{name}/")), None)


def control_of(metric: str, found: Collection[str]) -> str | None:
    """Return the name of a metric's control, the most telling of those found: shuffled prompts before random subspaces.

    Example:
        >>> control_of("energy_kept/down", ["energy_kept/down", "energy_kept_random/down"])
        'energy_kept_random/down'
    """
    return next((name for name in _controls(metric) if name in found), None)


def without_controls(found: Collection[str]) -> list[str]:
    """Return the metrics that are not the control of another."""
    controls = {name for metric in found for name in _controls(metric)}
    return [metric for metric in found if metric not in controls]


def _controls(metric: str) -> list[str]:
    base, slash, detail = metric.partition("/")
    return [f"{base}{end}{slash}{detail}" for end in _CONTROLS]
