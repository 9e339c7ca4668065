# SPDX-License-Identifier: Apache-2.0
"""Cells of a study: run once, kept, skipped, and left out where the time is short."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lightning_safety.training.studies import Cell, Cells


def make_cells(ran: list[str], *, fails: str = "") -> list[Cell]:
    def cell(name: str, estimate: float) -> Cell:
        def run() -> dict[str, Any]:
            if name == fails:
                raise RuntimeError("lost power")
            ran.append(name)
            return {"value": len(ran)}

        return Cell(name, estimate, run)

    return [cell("full/plain", 1800), cell("full/other", 3600), cell("lora/plain", 900)]


def test_every_cell_is_run_once(tmp_path: Path, capsys: Any) -> None:
    ran: list[str] = []
    first = Cells(tmp_path).run(make_cells(ran))
    assert ran == ["full/plain", "full/other", "lora/plain"]
    assert "0 of 3 cells are complete; the others take about 1.8 h." in capsys.readouterr().out
    again = Cells(tmp_path).run(make_cells(ran))
    assert len(ran) == 3
    assert again == first
    assert list(first) == ran
    assert {name: found["value"] for name, found in first.items()} == {name: i + 1 for i, name in enumerate(ran)}
    assert "3 of 3 cells are complete" in capsys.readouterr().out


def test_a_study_that_was_cut_short_goes_on_where_it_was(tmp_path: Path) -> None:
    ran: list[str] = []
    with pytest.raises(RuntimeError, match="lost power"):
        Cells(tmp_path).run(make_cells(ran, fails="full/other"))
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == ["plain.json"]
    Cells(tmp_path).run(make_cells(ran))
    assert ran == ["full/plain", "full/other", "lora/plain"]


def test_no_cell_begins_that_would_end_too_late(tmp_path: Path, capsys: Any) -> None:
    ran: list[str] = []
    runner = Cells(tmp_path, hours=0.6)
    cells = make_cells(ran)
    found = runner.run(cells)
    assert ran == ["full/plain", "lora/plain"]
    assert list(found) == ran
    assert [cell.name for cell in runner.missing(cells)] == ["full/other"]
    assert "of which 0.6 h are given" in capsys.readouterr().out


def test_a_damaged_result_is_named(tmp_path: Path) -> None:
    ran: list[str] = []
    Cells(tmp_path).run(make_cells(ran))
    path = tmp_path / "lora" / "plain.json"
    path.write_text(path.read_text(encoding="utf-8")[:-3], encoding="utf-8")
    with pytest.raises(ValueError, match=r"expected to hold JSON but is damaged\. Remove it to run lora/plain again"):
        Cells(tmp_path).run(make_cells(ran))


def test_a_result_that_json_cannot_hold_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        Cells(tmp_path).run([Cell("a", 1, lambda: {"value": float("nan")})])
    assert list(tmp_path.rglob("*.json")) == []
