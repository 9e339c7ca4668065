# SPDX-License-Identifier: Apache-2.0
"""Cells of a study: run once, kept, skipped, and left out where the time is short."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_safety.callbacks import SafetyPreservingAdaptation
from lightning_safety.scoring import RefusalMargin, SafetyMask
from lightning_safety.training.studies import Cell, Cells
from lightning_safety.training.studies.cells import describe_settings


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
    runner, cells = Cells(tmp_path), make_cells(ran)
    runner.run(cells)
    assert ran == ["full/plain", "full/other", "lora/plain"]
    assert "0 of 3 cells are complete; the others take about 1.8 h." in capsys.readouterr().out
    found = [runner.read(cell) for cell in cells]
    assert [one and one["value"] for one in found] == [1, 2, 3]
    Cells(tmp_path).run(make_cells(ran))
    assert len(ran) == 3
    assert [runner.read(cell) for cell in cells] == found
    assert "3 of 3 cells are complete" in capsys.readouterr().out


def test_a_cell_that_fails_keeps_no_other_from_being_run_and_is_tried_again(tmp_path: Path, capsys: Any) -> None:
    ran: list[str] = []
    runner = Cells(tmp_path)
    runner.run(make_cells(ran, fails="full/other"))
    assert ran == ["full/plain", "lora/plain"]
    assert runner.failed == {"full/other": "lost power"}
    assert "RuntimeError: lost power" in capsys.readouterr().err
    runner.run(make_cells(ran))
    assert ran == ["full/plain", "lora/plain", "full/other"]
    assert runner.failed == {}


def test_a_study_that_was_cut_short_goes_on_where_it_was(tmp_path: Path) -> None:
    ran: list[str] = []

    def stop() -> dict[str, Any]:
        raise KeyboardInterrupt

    cells = make_cells(ran)
    with pytest.raises(KeyboardInterrupt):
        Cells(tmp_path).run([cells[0], Cell("full/other", 1, stop), cells[2]])
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == ["plain.json"]
    Cells(tmp_path).run(make_cells(ran))
    assert ran == ["full/plain", "full/other", "lora/plain"]


def test_what_cells_took_corrects_what_the_others_are_expected_to_take(tmp_path: Path) -> None:
    ran: list[str] = []
    cells = make_cells(ran)
    runner = Cells(tmp_path)
    runner.run(cells[:1])
    path = tmp_path / "full" / "plain.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"seconds": 3600.0}), encoding="utf-8")
    assert runner.missing(cells) == {"full/other": 7200.0, "lora/plain": 1800.0}
    assert "the others take about 2.5 h" in runner.plan(cells)


def test_cells_of_other_settings_are_refused(tmp_path: Path) -> None:
    ran: list[str] = []

    def cell(**settings: Any) -> Cell:
        return Cell("full/plain", 1, lambda: ran.append("x") or {}, settings)

    runner = Cells(tmp_path)
    runner.run([cell(seed=0, at=[120])])
    runner.run([cell(seed=0, at=[120])])
    for other, message in (
        ({"seed": 1, "at": [120]}, "`seed` expected to be 0, which .* was measured with, but got 1"),
        ({"seed": 0, "at": [120, 500]}, r"`at` expected to be \[120\], which .* but got \[120, 500\]"),
        ({"seed": 0, "at": [120], "new": "a"}, "`new` expected to be None, which .* but got 'a'"),
    ):
        with pytest.raises(ValueError, match=message):
            runner.run([cell(**other)])
    assert len(ran) == 1


def test_no_cell_begins_that_would_end_too_late(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    ran: list[str] = []
    now = iter(range(0, 10**6, 900))  # every look at the clock a quarter of an hour later
    monkeypatch.setattr("lightning_safety.training.studies.cells.time.monotonic", lambda: float(next(now)))
    runner = Cells(tmp_path, hours=0.8)
    cells = make_cells(ran)
    runner.run(cells)
    assert ran == ["full/plain"]
    assert "at most 0.8 h are given to them" in capsys.readouterr().out


def test_a_damaged_result_is_named(tmp_path: Path) -> None:
    ran: list[str] = []
    Cells(tmp_path).run(make_cells(ran))
    path = tmp_path / "lora" / "plain.json"
    path.write_text(path.read_text(encoding="utf-8")[:-3], encoding="utf-8")
    with pytest.raises(ValueError, match=r"expected to hold JSON but is damaged\. Remove it to run lora/plain again"):
        Cells(tmp_path).run(make_cells(ran))


def test_a_result_that_json_cannot_hold_leaves_no_file(tmp_path: Path) -> None:
    runner = Cells(tmp_path)
    runner.run([Cell("a", 1, lambda: {"value": float("nan")})])
    assert "JSON" in runner.failed["a"]
    assert list(tmp_path.rglob("*.json")) == []


def test_settings_are_what_a_callback_was_made_with_and_not_what_it_keeps(tmp_path: Path) -> None:
    described = describe_settings(SafetyPreservingAdaptation(0.05, exclude="*embed*"))
    assert described == describe_settings(SafetyPreservingAdaptation(0.05, exclude="*embed*"))
    assert described["choice"]["fraction"] == 0.05
    assert not re.search(r'"_\w+":', json.dumps(described))
    for other in (
        SafetyPreservingAdaptation(0.05),
        SafetyPreservingAdaptation(0.05, exclude="*embed*", method="random"),
        SafetyPreservingAdaptation(0.05, exclude="*embed*", objective=RefusalMargin(limit=3)),
        SafetyPreservingAdaptation(exclude="*embed*", mask=SafetyMask({"a": torch.tensor([1])}, {"a": (3,)})),
    ):
        assert describe_settings(other) != described
    masks = []
    for place in range(2):
        path = tmp_path / str(place) / "mask.safetensors"
        path.parent.mkdir()
        SafetyMask({"a": torch.tensor([place])}, {"a": (3,)}).save(path)
        masks.append(describe_settings(SafetyPreservingAdaptation(mask=path)))
    assert masks[0] != masks[1]
