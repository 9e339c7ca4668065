# SPDX-License-Identifier: Apache-2.0
"""The cells of a study: each is run once, leaves a file, and is skipped by whoever runs the study again."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_safety.files import replace_atomically

_SECONDS_PER_HOUR = 3600


@dataclass(frozen=True)
class Cell:
    """One measurement of a study.

    Attributes:
        name: Its name, such as ``full/benign/plain``; also that of its file.
        estimate: How long it is expected to take, in seconds.
        run: Measures it, and returns what a JSON file can hold.
        settings: What it is measured with, as a JSON file holds it. A file of other settings is refused.
    """

    name: str
    estimate: float
    run: Callable[[], dict[str, Any]]
    settings: Mapping[str, Any] = field(default_factory=dict)


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
        path = self._path(cell)
        if not path.exists():
            return None
        try:
            found = dict(json.loads(path.read_text(encoding="utf-8")))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"`{path}` expected to hold JSON but is damaged. Remove it to run {cell.name} again."
            ) from error
        before = found.pop("settings")
        for name in {**before, **cell.settings}:
            if before.get(name) != cell.settings.get(name):
                raise ValueError(
                    f"`{name}` expected to be {before.get(name)!r}, which {path} was measured with, but got"
                    f" {cell.settings.get(name)!r}. Pass another `output`, or remove the file to run {cell.name} again."
                )
        return found

    def _scale(self, cells: Sequence[Cell]) -> float:
        """Return how many times as long as expected the complete cells took; 1 where there is none."""
        complete = [(found["seconds"], cell.estimate) for cell in cells if (found := self.read(cell)) is not None]
        expected = sum(estimate for _, estimate in complete)
        return sum(seconds for seconds, _ in complete) / expected if expected else 1.0

    def _write(self, cell: Cell, found: dict[str, Any], begun: float) -> None:
        content = {"settings": dict(cell.settings), "seconds": time.monotonic() - begun, **found}
        with replace_atomically(self._path(cell)) as temporary:
            temporary.write_text(json.dumps(content, indent=1, allow_nan=False), encoding="utf-8")

    def _path(self, cell: Cell) -> Path:
        return self.folder / f"{cell.name}.json"
