# SPDX-License-Identifier: Apache-2.0
"""The file that checks are appended to."""

from __future__ import annotations

import json
import math
import stat
from pathlib import Path

import pytest

from lightning_safety.callbacks.log import record


def _read(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_are_appended_and_what_is_there_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "log.jsonl"
    record(path, [{"step": 0}, {"step": 1}])
    before, number = path.read_bytes(), path.stat().st_ino
    record(path, [{"step": 2}], replacing={"step": 2})
    assert path.read_bytes() == before + b'{"step": 2}\n'
    assert path.stat().st_ino == number


def test_a_line_of_the_same_check_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    record(path, [{"run": "a", "step": 1, "value": 1}, {"run": "b", "step": 1, "value": 2}, {"run": "a", "step": 2}])
    record(path, [{"run": "a", "step": 1, "value": 3}], replacing={"run": "a", "step": 1})
    assert _read(path) == [
        {"run": "b", "step": 1, "value": 2},
        {"run": "a", "step": 2},
        {"run": "a", "step": 1, "value": 3},
    ]


@pytest.mark.parametrize("replacing", [None, {"step": 1}])
def test_a_line_cut_by_a_kill_is_dropped_and_foreign_lines_are_kept(
    tmp_path: Path, replacing: dict[str, object] | None
) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 0}\nnot ours\u2028\n[1]\n{"step": 1, "val')
    record(path, [{"step": 1}], replacing=replacing)
    assert path.read_text() == '{"step": 0}\nnot ours\u2028\n[1]\n{"step": 1}\n'


def test_lines_are_strict_json(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    record(path, [{"value": math.nan, "rates": {"interval": (0.5, math.inf)}, "text": "\x1b[2J\n\ud800"}])
    assert path.read_bytes().isascii()
    assert _read(path) == [{"value": None, "rates": {"interval": [0.5, None]}, "text": "\x1b[2J\n\ud800"}]


def test_a_private_file_stays_private(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    for _ in range(2):
        record(path, [{"step": 1}], replacing={"step": 1}, mode=0o600)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
