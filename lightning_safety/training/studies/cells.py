# SPDX-License-Identifier: Apache-2.0
"""The cells of a study: each is run once, leaves a file, and is skipped by whoever runs the study again."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
    """

    name: str
    estimate: float
    run: Callable[[], dict[str, Any]]


class Cells:
    """Runs cells in order, as long as there is time, and keeps what they found.

    Args:
        folder: Where their files are: ``<name>.json`` each, written when the cell is complete.
        hours: Run no cell that is expected to end later than so many hours from now. None: run all.
    """

    def __init__(self, folder: Path, hours: float | None = None) -> None:
        self.folder = folder
        self.hours = hours

    def run(self, cells: Sequence[Cell]) -> dict[str, dict[str, Any]]:
        """Run the cells that have no file yet.

        Args:
            cells: Their names differ.

        Returns:
            What the complete cells found, by name, in order. Each has ``seconds``, what it took, beside its own.
        """
        print(self.plan(cells), flush=True)
        started = time.monotonic()
        for cell in cells:
            if self.read(cell) is not None:
                continue
            spent = time.monotonic() - started
            if self.hours is not None and spent + cell.estimate > self.hours * _SECONDS_PER_HOUR:
                continue
            begun = time.monotonic()
            found = cell.run()
            self._write(cell, {"seconds": time.monotonic() - begun, **found})
            print(f"{cell.name}: {time.monotonic() - begun:.0f} s", flush=True)
        results = {cell.name: self.read(cell) for cell in cells}
        return {name: found for name, found in results.items() if found is not None}

    def plan(self, cells: Sequence[Cell]) -> str:
        """Return how many cells are complete, and about how long the others take."""
        missing = self.missing(cells)
        hours = sum(cell.estimate for cell in missing) / _SECONDS_PER_HOUR
        limit = "" if self.hours is None else f", of which {self.hours:g} h are given"
        complete = f"{len(cells) - len(missing)} of {len(cells)} cells are complete"
        return f"{complete}; the others take about {hours:.1f} h{limit}."

    def missing(self, cells: Sequence[Cell]) -> list[Cell]:
        """Return the cells that have no file yet."""
        return [cell for cell in cells if self.read(cell) is None]

    def read(self, cell: Cell) -> dict[str, Any] | None:
        """Return what a cell found; None where it has not been run.

        Raises:
            ValueError: Its file is damaged.
        """
        path = self._path(cell)
        if not path.exists():
            return None
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"`{path}` expected to hold JSON but is damaged. Remove it to run {cell.name} again."
            ) from error
        return dict(found)

    def _write(self, cell: Cell, found: dict[str, Any]) -> None:
        with replace_atomically(self._path(cell)) as temporary:
            temporary.write_text(json.dumps(found, indent=1, allow_nan=False), encoding="utf-8")

    def _path(self, cell: Cell) -> Path:
        return self.folder / f"{cell.name}.json"
