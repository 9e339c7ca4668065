# SPDX-License-Identifier: Apache-2.0
"""What a study left is read, counted, and what it lacks is said."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest

from lightning_safety.drawing import new_figure
from lightning_safety.report.studies import read_study, reading
from lightning_safety.report.studies.reading import StudyResults, write_study


def write(folder: Path, name: str, seconds: float, machine: str = "one") -> None:
    path = folder / "cells" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"seconds": seconds, "machine": machine}), encoding="utf-8")


def test_cells_are_read_in_the_order_of_the_plan_and_missing_ones_estimated(tmp_path: Path) -> None:
    plan = {"b/x": 100.0, "a": 50.0, "b/y": 200.0, "b/z": 200.0}
    (tmp_path / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    write(tmp_path, "a", 100.0)
    write(tmp_path, "b/x", 200.0, "another")
    write(tmp_path, "b/of-another-plan", 1.0)
    found = read_study(tmp_path)
    assert list(found.found) == ["b/x", "a"]
    assert found.missing == {"b/y": 400.0, "b/z": 400.0}
    assert found.footer == (
        "2 cells in 0.08 h (another; one).\n\nNot run, with the hours they would take, estimated:\n\n- b: y, z (0.22 h)"
    )


def test_a_folder_that_is_no_study_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected to be the folder of a study but has no plan\.json"):
        read_study(tmp_path)


def test_without_cells_there_is_nothing_to_say() -> None:
    assert StudyResults({}, {}).footer == ""


def test_figures_are_shown_below_the_text_and_left_out_without_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = {"one": partial(new_figure, 1, 1)}
    assert write_study("text", figures, tmp_path) == "text\n\n![one](one.png)\n"
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(reading, "has_matplotlib", lambda: False)
    assert write_study("text", figures, tmp_path) == "text\n"
    assert (tmp_path / "results.md").read_text(encoding="utf-8") == "text\n"
