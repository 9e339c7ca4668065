# SPDX-License-Identifier: Apache-2.0
"""The tables and the figure of a study of several ways to keep safety."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lightning_safety.report.studies import preservation, reading
from lightning_safety.report.studies.preservation import draw_front, write_preservation
from tests.report.studies import made_up


def look(step: int, attacks: int, seconds: float, **metrics: float) -> dict[str, Any]:
    found = made_up.look(attacks, step=step, training_seconds=seconds)
    return found | {"metrics": {f"safety/{name}": value for name, value in metrics.items()}}


RESULTS = {
    "before": {"looks": [look(0, 5, 0.0)]},
    "full/benign/plain": {"looks": [look(10, 30, 100.0), look(20, 40, 200.0)]},
    "full/benign/rehearsal": {"looks": [look(10, 6, 112.0, rehearsal_share=0.25), look(20, 7, 230.0)]},
    "full/benign/spa-random": {"looks": [look(10, 31, 99.0), look(20, 39, 198.0)]},
    "lora/benign/rehearsal": {"looks": [look(10, 8, 50.0)]},
}


def test_tables_hold_every_look_and_what_it_is_compared_with(tmp_path: Path) -> None:
    text = write_preservation(
        made_up.results(RESULTS, **{"lora/benign/plain": 1800.0, "lora/benign/spa": 900.0}), tmp_path
    )
    assert (tmp_path / "results.md").read_text(encoding="utf-8") == text
    full, lora = text.split("### ")[1:]
    lines = full.splitlines()
    assert lines[0] == "full/benign"
    rows = {tuple(cell.strip() for cell in line.split("|")[1:3]): line for line in lines if line.startswith("| ")}
    assert len(rows) == 1 + 1 + 6
    assert "0.60 [0.46, 0.72] n=50" in rows["plain", "10"]
    assert "| +12 % | 0.25 |" in rows["rehearsal", "10"]
    assert "| +15 % | – |" in rows["rehearsal", "20"]
    assert "| -1 % | – |" in rows["spa-random", "20"]
    assert "| 20.00 [19.00, nan] |" in rows["before", "0"]
    # Without a plain fit there is nothing to compare time with.
    assert "| – | – |" in next(line for line in lora.splitlines() if line.startswith("| rehearsal"))
    assert "Not run, with the hours they would take, estimated:\n\n- lora/benign: plain, spa (0.75 h)\n" in text


def test_a_cell_whose_seconds_were_taken_out_has_no_extra_time(tmp_path: Path) -> None:
    results = {**RESULTS, "full/benign/rehearsal": {"looks": [look(10, 6, 0.0) | {"training_seconds": None}]}}
    text = write_preservation(made_up.results(results), tmp_path)
    assert "| – | – |" in next(line for line in text.splitlines() if line.startswith("| rehearsal | 10"))


def test_without_a_plain_fit_the_seconds_of_rehearsals_stand_beside_the_rest(tmp_path: Path) -> None:
    seen = look(10, 6, 0.0) | {"training_seconds": 120.0, "metrics": {"safety/rehearsal_seconds": 20.0}}
    text = write_preservation(made_up.results({"full/benign/rehearsal": {"looks": [seen]}}), tmp_path)
    assert "| +20 % | – |" in next(line for line in text.splitlines() if line.startswith("| rehearsal | 10"))


def test_figures_show_the_last_look_of_each_arm_and_its_control_hollow(tmp_path: Path) -> None:
    write_preservation(made_up.results(RESULTS), tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["front-full.png", "front-lora.png"]
    groups = preservation._groups(RESULTS)
    figure = draw_front({"full/benign": groups["full/benign"]}, preservation._points({"before": RESULTS["before"]})[0])
    against_task, against_time = figure.axes
    containers = {container.get_label(): container for container in against_time.containers}
    assert list(containers) == ["plain", "rehearsal", "spa-random"]
    (x,), (y,) = containers["rehearsal"].lines[0].get_data()
    assert (x, y) == (pytest.approx(0.15), 7 / 50)
    assert containers["spa-random"].lines[0].get_markerfacecolor() == "white"
    assert containers["rehearsal"].lines[0].get_markerfacecolor() != "white"
    assert len(against_task.containers) == 3
    assert "20 steps" in against_task.get_title(loc="left")


def test_tables_need_no_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "has_matplotlib", lambda: False)
    assert "full/benign" in write_preservation(made_up.results(RESULTS), tmp_path)
    assert not list(tmp_path.glob("*.png"))
