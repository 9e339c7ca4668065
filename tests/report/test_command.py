# SPDX-License-Identifier: Apache-2.0
"""``lightning-safety report``."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_safety.cli import main
from tests.report.folders import check_line, write_lines


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    folders = [tmp_path / name for name in ("first", "second", "third")]
    for harmful, folder in enumerate(folders):
        write_lines(folder / "safety.jsonl", [check_line(0, harmful=harmful)])
    return folders


def test_it_prints_where_the_page_is(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["report", str(runs[0])])
    assert capsys.readouterr().out == f"{runs[0] / 'safety_report.html'}\n"
    main(["report", str(runs[0]), "-o", str(tmp_path / "page.html")])
    assert (tmp_path / "page.html").read_bytes()[:15] == b"<!DOCTYPE html>"


@pytest.mark.parametrize("form", ["--compare {1} {2}", "--compare {1} --compare={2}", "--compare [{1},{2}]"])
def test_runs_can_be_compared(form: str, runs: list[Path]) -> None:
    main(["report", str(runs[0]), *form.format(*runs).split(), "-o", str(runs[0] / "page.html")])
    text = (runs[0] / "page.html").read_text(encoding="utf-8")
    assert "<h1>Safety report: first, second, third</h1>" in text


def test_what_is_wrong_is_said(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (runs[1] / "safety.jsonl").unlink()
    for words, message in (([runs[0], "--compare", runs[1]], "something to report"), ([tmp_path / "x"], "no folder")):
        with pytest.raises(SystemExit) as stop:
            main(["report", *map(str, words)])
        assert stop.value.code == 1
        assert message in capsys.readouterr().err
