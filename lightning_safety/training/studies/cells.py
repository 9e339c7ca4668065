# SPDX-License-Identifier: Apache-2.0
"""The cells of a study: each is run once, leaves a file, and is skipped by whoever runs the study again."""

from __future__ import annotations

import hashlib
import json
import os
import time
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_safety.arguments import check_choice
from lightning_safety.callbacks.selected import SelectedWeightsCallback
from lightning_safety.data import Example
from lightning_safety.devices import processor_name
from lightning_safety.files import replace_atomically
from lightning_safety.report.studies.reading import CELLS, PLAN, StudyResults, read_study, time_scale

_SECONDS_PER_HOUR = 3600
_PARTS, _PART_BYTES = 64, 65_536


@dataclass(frozen=True)
class Cell:
    """One measurement of a study.

    Attributes:
        name: Its name, such as ``full/benign/plain``; also that of its file.
        estimate: How long it is expected to take, in seconds.
        run: Measures it, and returns what a JSON file can hold.
        settings: What it is measured with, as a JSON file holds it. A file of other settings is refused.
        always: Whether it is run whichever cells are asked for: what the others are compared with.
    """

    name: str
    estimate: float
    run: Callable[[], dict[str, Any]]
    settings: Mapping[str, Any] = field(default_factory=dict)
    always: bool = False


def run_study_cells(
    cells: Sequence[Cell],
    write: Callable[[StudyResults, Path], str],
    *,
    output: Path,
    shared: Mapping[str, Any],
    hours: float | None = None,
    only: Collection[str] | None = None,
) -> None:
    """Run the cells of a study that are asked for and have no file yet, and write what all of them found.

    Args:
        cells: All of the study, in order; their names differ.
        write: Writes tables and figures of the results into a folder, and returns the text.
        output: The folder; the cells' files are in a folder of their own in it, and so is the plan.
        shared: Settings that cells of earlier runs in the folder must have too, to stand beside these.
        hours: Start no cell that is expected to end later than so many hours from now. None: run all.
        only: Run these cells only: a cell's name, or a part of it between slashes. None: run all.

    Raises:
        ValueError: A file is damaged, or of a cell with other settings; or `only` names no cell.
        RuntimeError: Some cells failed; the others were run, and are in the results.
    """
    parts = list(dict.fromkeys(part for cell in cells for part in (*cell.name.split("/"), cell.name)))
    for name in only or ():
        check_choice(name, "only", parts)
    chosen = [
        cell
        for cell in cells
        if only is None or cell.always or any(part in only for part in (cell.name, *cell.name.split("/")))
    ]
    runner = Cells(output / CELLS, hours)
    for cell in cells:
        # All of them: those that are not asked for stand in the same tables.
        runner.read(cell)
    plan = _plan_with_earlier(cells, runner, output, shared)
    with replace_atomically(output / PLAN) as temporary:
        temporary.write_text(json.dumps(plan, indent=1), encoding="utf-8")
    try:
        runner.run(chosen)
    finally:
        print(write(read_study(output), output))
    if runner.failed:
        listed = "; ".join(f"{name}: {error}" for name, error in runner.failed.items())
        raise RuntimeError(f"{len(runner.failed)} cells failed, the others are complete. {listed}")


def _plan_with_earlier(
    cells: Sequence[Cell], runner: Cells, output: Path, shared: Mapping[str, Any]
) -> dict[str, float]:
    """Return which cells there are, those of earlier plans too where they have been run.

    Raises:
        ValueError: One of these has other settings than all cells of a study share.
    """
    plan = {cell.name: cell.estimate for cell in cells}
    path = output / PLAN
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for name, estimate in before.items():
        if name not in plan and (found := runner.settings_of(name)) is not None:
            _check_settings(name, output / CELLS / f"{name}.json", found, found | _common(shared, found))
            plan[name] = estimate
    return plan


def _common(shared: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    # What the others are compared with, `before` say, has fewer settings.
    return {name: value for name, value in shared.items() if name in found}


def _check_settings(cell: str, path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for name in {**before, **now}:
        if before.get(name) != now.get(name):
            raise ValueError(
                f"`{name}` expected to be {before.get(name)!r}, which {path} was measured with, but got"
                f" {now.get(name)!r}. Pass another `output`, or remove the file to run {cell} again."
            )


class Cells:
    """Runs cells in order, as long as there is time, and keeps what they found.

    Args:
        folder: Where their files are: ``<name>.json`` each, written when the cell is complete.
        hours: Run no cell that is expected to end later than so many hours from now. None: run all.

    Attributes:
        failed: The cells of the last run that ended with an error, and its text. They have no file: another run tries
            them again.
    """

    def __init__(self, folder: Path, hours: float | None = None) -> None:
        self.folder = folder
        self.hours = hours
        self.failed: dict[str, str] = {}

    def run(self, cells: Sequence[Cell]) -> None:
        """Run the cells that have no file yet. One that fails does not keep the others from being run.

        Args:
            cells: Their names differ.

        Raises:
            ValueError: A file is damaged, or of a cell with other settings.
        """
        print(self.plan(cells), flush=True)
        started = time.monotonic()
        self.failed = {}
        for cell in cells:
            if self.read(cell) is not None or self._ends_too_late(cell, cells, started):
                continue
            begun = time.monotonic()
            try:
                self._write(cell, cell.run(), begun)
            except Exception as error:
                traceback.print_exc()
                self.failed[cell.name] = str(error) or type(error).__name__
            print(f"{cell.name}: {time.monotonic() - begun:.0f} s", flush=True)

    def _ends_too_late(self, cell: Cell, cells: Sequence[Cell], started: float) -> bool:
        if self.hours is None:
            return False
        expected = cell.estimate * self._scale(cells)
        return time.monotonic() - started + expected > self.hours * _SECONDS_PER_HOUR

    def plan(self, cells: Sequence[Cell]) -> str:
        """Return how many cells are complete, and about how long the others take."""
        missing = self.missing(cells)
        hours = sum(missing.values()) / _SECONDS_PER_HOUR
        limit = "" if self.hours is None else f"; at most {self.hours:g} h are given to them"
        complete = f"{len(cells) - len(missing)} of {len(cells)} cells are complete"
        return f"{complete}; the others take about {hours:.1f} h{limit}."

    def missing(self, cells: Sequence[Cell]) -> dict[str, float]:
        """Return the cells that have no file yet, and about how long they take, in seconds, by the complete ones."""
        scale = self._scale(cells)
        return {cell.name: cell.estimate * scale for cell in cells if self.read(cell) is None}

    def read(self, cell: Cell) -> dict[str, Any] | None:
        """Return what a cell found, and ``seconds``, what that took; None where it has not been run.

        Raises:
            ValueError: Its file is damaged, or of other settings.
        """
        found = self._load(cell.name)
        if found is not None:
            _check_settings(cell.name, self._path(cell.name), found.pop("settings"), cell.settings)
        return found

    def settings_of(self, name: str) -> dict[str, Any] | None:
        """Return what a cell was measured with; None where it has not been run.

        Raises:
            ValueError: Its file is damaged.
        """
        found = self._load(name)
        return None if found is None else dict(found["settings"])

    def _load(self, name: str) -> dict[str, Any] | None:
        path = self._path(name)
        if not path.exists():
            return None
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"`{path}` expected to hold JSON but is damaged. Remove it to run {name} again."
            ) from error

    def _scale(self, cells: Sequence[Cell]) -> float:
        """Return how many times as long as expected the complete cells took; 1 where there is none."""
        return time_scale((found["seconds"], cell.estimate) for cell in cells if (found := self.read(cell)) is not None)

    def _write(self, cell: Cell, found: dict[str, Any], begun: float) -> None:
        machine = f"{processor_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
        seconds = time.monotonic() - begun
        content = {"settings": dict(cell.settings), "seconds": seconds, "machine": machine, **found}
        with replace_atomically(self._path(cell.name)) as temporary:
            temporary.write_text(json.dumps(content, indent=1, allow_nan=False), encoding="utf-8")

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"


def describe_settings(value: Any) -> Any:
    """Return what an object was made with, as JSON holds it, to tell whether a study was changed since.

    Args:
        value: A fresh callback, say: its public attributes, and theirs, and a digest of the mask it was given. Tensors
            are described by a digest, and what else JSON does not have by its class.
    """
    if isinstance(value, str | int | float | bool | None):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Tensor):
        content = value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        return hashlib.sha256(content).hexdigest()[:16]
    if isinstance(value, Mapping):
        return {str(key): describe_settings(one) for key, one in value.items() if one is not None}
    if isinstance(value, set | frozenset):
        return sorted(map(describe_settings, value), key=str)
    if isinstance(value, Sequence):
        return [describe_settings(one) for one in value]
    public = {name: one for name, one in getattr(value, "__dict__", {}).items() if not name.startswith("_")}
    if isinstance(value, SelectedWeightsCallback) and value.mask is not None:
        public["mask"] = value.mask.digest
    return {"class": type(value).__name__, **describe_settings(public)}


def describe_rows(rows: Sequence[Example]) -> str:
    """Return how many rows there are, and a digest of what they say."""
    written = json.dumps([(row.prompt, row.response) for row in rows])
    return f"{len(rows)} rows, {hashlib.sha256(written.encode()).hexdigest()[:16]}"


def describe_source(source: str | os.PathLike[str]) -> str:
    """Return the name of a model, and of a folder or file a digest of what is in it, wherever it lies.

    Of every file, parts spread evenly are read: training changes all of them, and a large model is not read whole.
    """
    path = Path(source)
    if not path.exists():
        return str(source)
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            size = file.stat().st_size
            digest.update(f"{file.name} {size}".encode())
            with file.open("rb") as content:
                for part in range(_PARTS):
                    content.seek(part * max(0, size - _PART_BYTES) // (_PARTS - 1))
                    digest.update(content.read(_PART_BYTES))
    return f"{path.resolve().name}, {digest.hexdigest()[:16]}"
