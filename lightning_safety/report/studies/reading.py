# SPDX-License-Identifier: Apache-2.0
"""What the cells of a study found, read from its folder, and what of it is still to be run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_safety.drawing import has_matplotlib
from lightning_safety.files import replace_atomically

if TYPE_CHECKING:
    from collections.abc import Callable

    from matplotlib.figure import Figure

CELLS, PLAN = "cells", "plan.json"
"""In the folder of a study: the folder of the cells' files, and the file of all cells with their expected seconds."""

_SECONDS_PER_HOUR = 3600


@dataclass(frozen=True)
class StudyResults:
    """The cells of a study.

    Attributes:
        found: What those that were run found, by name, in the order of the plan.
        missing: Those that were not, and what they would take, in seconds, by what the others took.
    """

    found: Mapping[str, Mapping[str, Any]]
    missing: Mapping[str, float]

    @property
    def footer(self) -> str:
        """Hours and machines that the cells took, and below it the cells that were not run."""
        hours = sum(found["seconds"] for found in self.found.values()) / _SECONDS_PER_HOUR
        machines = "; ".join(dict.fromkeys(str(found["machine"]) for found in self.found.values()))
        lines = (
            [f"{len(self.found)} cells in {hours:.2f} h ({machines}). {self._settings()}".strip()] if self.found else []
        )
        if self.missing:
            lines += ["", "Not run, with the hours they would take, estimated:", "", *self._not_run()]
        return "\n".join(lines)

    def _settings(self) -> str:
        """Return the settings that all cells share, as far as they have them."""
        values: dict[str, list[Any]] = {}
        for found in self.found.values():
            for name, value in found.get("settings", {}).items():
                values.setdefault(name, []).append(value)
        shared = {name: of[0] for name, of in values.items() if all(one == of[0] for one in of) and _is_short(of[0])}
        listed = "; ".join(f"{name}: {value}" for name, value in shared.items())
        return f"Settings: {listed}." if listed else ""

    def _not_run(self) -> list[str]:
        names: dict[str, list[str]] = {}
        hours: dict[str, float] = {}
        for name, seconds in self.missing.items():
            title, _, cell = name.rpartition("/")
            names.setdefault(title, []).append(cell)
            hours[title] = hours.get(title, 0.0) + seconds / _SECONDS_PER_HOUR
        return [
            f"- {f'{title}: ' if title else ''}{', '.join(cells)} ({hours[title]:.2f} h)"
            for title, cells in names.items()
        ]


def _is_short(value: Any) -> bool:
    scalar = str | int | float | bool
    return isinstance(value, scalar) or (isinstance(value, list) and all(isinstance(one, scalar) for one in value))


def read_study(folder: Path) -> StudyResults:
    """Read what a study left in its folder.

    Raises:
        FileNotFoundError: There is no plan in it: it is not the folder of a study.
    """
    path = folder / PLAN
    if not path.exists():
        raise FileNotFoundError(
            f"`{folder}` expected to be the folder of a study but has no {PLAN}. Run one with `lightning-safety study`."
        )
    plan: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
    files = {name: folder / CELLS / f"{name}.json" for name in plan}
    found = {name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items() if file.exists()}
    scale = time_scale((found[name]["seconds"], plan[name]) for name in found)
    return StudyResults(found, {name: seconds * scale for name, seconds in plan.items() if name not in found})


def time_scale(pairs: Iterable[tuple[float, float]]) -> float:
    """Return how many times as long as expected cells took, by (seconds, expected seconds) of each; 1 without any."""
    taken = list(pairs)
    expected = sum(estimate for _, estimate in taken)
    return sum(seconds for seconds, _ in taken) / expected if expected else 1.0


def write_study(text: str, figures: Mapping[str, Callable[[], Figure]], output: Path) -> str:
    """Write ``results.md`` and, with matplotlib, figures as PNG, and return the text.

    Args:
        text: Of ``results.md``; figures are shown below it.
        figures: What draws each, by the name of its file.
        output: The folder.
    """
    drawn = figures if has_matplotlib() else {}
    for name, draw in drawn.items():
        with replace_atomically(output / f"{name}.png") as temporary:
            draw().savefig(temporary, format="png")
    text = "\n\n".join([text.strip(), *(f"![{name}]({name}.png)" for name in drawn)]) + "\n"
    with replace_atomically(output / "results.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    return text
