# SPDX-License-Identifier: Apache-2.0
"""Reading a run folder: what a fit or a study left there."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_safety.report.checks import Check, Point, find_metric, read_checks, series
from lightning_safety.report.masks import read_mask_entries, read_mask_files
from lightning_safety.report.measures import Measure, measure
from lightning_safety.report.replies import REPLIES_FILE, Sample, replies_of_checks, replies_of_evaluations
from lightning_safety.report.settings import RUN_FILE, without_secrets
from lightning_safety.scoring.describe import MaskDescription

METRICS_FILE = "safety.jsonl"
RESULTS_FILE = "results.json"
_CONTROL = "log-random-mask"
"""Where a study logs its control, beside the fit."""


@dataclass(frozen=True)
class RunRecord:
    """What a run folder holds.

    Attributes:
        name: The folder's name.
        evaluations: By column of ``results.json`` (before, after, random mask) the value of each measure.
        judged: What these were judged by, on which prompts: sentences.
        checks: The checks of the last fit, and of ``validate`` and ``test``.
        control_checks: Those of the fit with a random mask.
        masks: Where the selected weights are, by mask.
        check_samples: Replies at the first and the last check.
        evaluation_samples: Replies before and after.
        settings: What ``run.json`` says of the trainer, the module, callbacks, versions and machine.
        configuration: LightningCLI's ``config.yaml``, or the ``hparams.yaml`` of a logger; empty: there is none.
        notes: What the reader should know of the files.
    """

    name: str
    evaluations: dict[str, dict[str, Measure]] = field(default_factory=dict)
    judged: tuple[str, ...] = ()
    checks: tuple[Check, ...] = ()
    control_checks: tuple[Check, ...] = ()
    masks: dict[str, MaskDescription] = field(default_factory=dict)
    check_samples: tuple[Sample, ...] = ()
    evaluation_samples: tuple[Sample, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    configuration: str = ""
    notes: tuple[str, ...] = ()

    @property
    def series(self) -> dict[str, list[Point]]:
        """The points of each metric in the fit."""
        return series(check for check in self.checks if check.stage == "fit")

    @property
    def control_series(self) -> dict[str, list[Point]]:
        """The points of each metric in the fit with a random mask."""
        return series(check for check in self.control_checks if check.stage == "fit")

    @property
    def callbacks(self) -> list[tuple[str, dict[str, Any]]]:
        """Class and arguments of each of our callbacks in ``run.json``."""
        found = self.settings.get("callbacks")
        entries = [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []
        arguments = [entry.get("arguments") for entry in entries]
        return [
            (str(entry.get("class")), given if isinstance(given, dict) else {})
            for entry, given in zip(entries, arguments, strict=True)
        ]

    @property
    def budgets(self) -> dict[str, float]:
        """The value that a `SafetyBudget` lets a metric rise to: the one before the first step + ``max_increase``."""
        found = {}
        points = self.series
        for _, arguments in self.callbacks:
            name = find_metric(points, str(arguments.get("metric")))
            increase = measure(arguments.get("max_increase"))
            # Of a fit that was resumed in another folder, the value before the first step is not here.
            first = points[name][0].measure.value if name is not None and points[name][0].step == 0 else None
            if name is not None and first is not None and increase is not None and increase.value is not None:
                found[name] = first + increase.value
        return found


def read_run(folder: str | os.PathLike[str], name: str | None = None) -> RunRecord:
    """Read a run folder: Lightning's, with ``safety.jsonl``, or that of a study, with ``results.json``.

    Args:
        folder: The folder. Logs may lie up to two folders below, as in ``lightning_logs/version_0``.
        name: What the run is called. Default: the folder's name.

    Raises:
        FileNotFoundError: There is no such folder, or nothing in it to report.
        ValueError: ``results.json`` is damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"`run` expected to be a run folder but there is no folder {folder}. Pass the folder that holds"
            f" {METRICS_FILE} or {RESULTS_FILE}."
        )
    notes: list[str] = []
    logs = _log_folders(folder, notes)
    log = logs[-1] if logs else folder
    near = list(dict.fromkeys([folder, log]))
    evaluations, judged = _read_results(folder / RESULTS_FILE)
    checks = read_checks(log / METRICS_FILE, notes) if logs else []
    control = folder / _CONTROL / METRICS_FILE
    settings = _read_settings(near, notes)
    masks = read_mask_files(near, notes) or read_mask_entries(settings.get("masks"))
    if not evaluations and not checks and not masks:
        raise FileNotFoundError(
            f"`run` expected to be a run folder with something to report but {folder} has neither {METRICS_FILE} (which"
            f" monitors write during a fit) nor {RESULTS_FILE} (of `lightning-safety study`) nor a mask. Add"
            " HarmfulnessMonitor to the trainer's callbacks, or name another folder."
        )
    return RunRecord(
        name=name or folder.resolve().name,
        evaluations=evaluations,
        judged=judged,
        checks=tuple(checks),
        control_checks=tuple(read_checks(control, notes)) if control.is_file() and log != control.parent else (),
        masks=masks,
        check_samples=replies_of_checks(log / REPLIES_FILE, checks, notes),
        evaluation_samples=replies_of_evaluations(folder, evaluations, notes),
        settings=settings,
        configuration=_read_configuration(near),
        notes=tuple(notes),
    )


def _log_folders(folder: Path, notes: list[str]) -> list[Path]:
    """Return the folders that hold checks, the one to report last."""
    if (folder / METRICS_FILE).is_file():
        return [folder]
    for pattern in (f"*/{METRICS_FILE}", f"*/*/{METRICS_FILE}"):
        found = [file.parent.relative_to(folder) for file in folder.glob(pattern) if file.parent.name != _CONTROL]
        found.sort(key=lambda path: [_natural(part) for part in path.parts])
        if len(found) > 1:
            notes.append(f"The folder holds {len(found)} logs; this page shows {found[-1].as_posix()}.")
        if found:
            return [folder / path for path in found]
    return []


def _natural(text: str) -> list[tuple[int, str]]:
    """Return a sorting key by which version_10 comes after version_9."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", text)]


def _read_results(path: Path) -> tuple[dict[str, dict[str, Measure]], tuple[str, ...]]:
    """Return the columns of a study's results, and sentences on how they were found."""
    if not path.is_file():
        return {}, ()
    columns = _read_object(path)
    if columns is None or not all(isinstance(column, dict) for column in columns.values()):
        raise ValueError(
            f"{path} expected to be the results of `lightning-safety study` but it is damaged. Restore it, or remove it"
            " to report the rest."
        )
    found = {}
    for name, column in columns.items():
        measures = {metric: measure(entry) for metric, entry in column.items() if metric != "max_new_tokens"}
        found[str(name)] = {metric: one for metric, one in measures.items() if one is not None}
    sentences: dict[str, None] = {}
    for column in columns.values():
        prompts = column.get("prompts")
        named = ", ".join(map(str, prompts.values())) if isinstance(prompts, dict) else ""
        said = [f"Judge: {column['judge']}."] if column.get("judge") else []
        said += [f"Replies: {column['max_new_tokens']} tokens at most."] if column.get("max_new_tokens") else []
        said += [f"Prompts: {named}."] if named else []
        notes = column.get("notes")
        sentences |= dict.fromkeys([*said, *map(str, notes if isinstance(notes, list) else ())])
    return found, tuple(sentences)


def _read_settings(folders: list[Path], notes: list[str]) -> dict[str, Any]:
    for file in [folder / RUN_FILE for folder in folders]:
        if file.is_file():
            found = _read_object(file)
            if found is not None:
                return found
            notes.append(f"{RUN_FILE} is damaged and left out.")
    return {}


def _read_object(path: Path) -> dict[str, Any] | None:
    """Return the object that a JSON file holds; None where it holds none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _read_configuration(folders: list[Path]) -> str:
    for name in ("config.yaml", "hparams.yaml"):
        for file in [folder / name for folder in folders]:
            if file.is_file():
                return without_secrets(file.read_text(encoding="utf-8", errors="replace"))
    return ""
