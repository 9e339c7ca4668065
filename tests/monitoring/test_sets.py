# SPDX-License-Identifier: Apache-2.0
"""The prompts of an evaluation, from everything that can name them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightning_safety.data import Example, load_prompts
from lightning_safety.monitoring import read_prompts
from lightning_safety.monitoring.sets import spread


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "behaviours.jsonl"
    path.write_text("".join(json.dumps({"goal": f"prompt {index}", "split": "a"}) + "\n" for index in range(5)))
    return path


def test_a_built_in_set_is_read_in_the_split_of_the_caller() -> None:
    name, examples = read_prompts("borderline", "borderline", split="monitor")
    assert name == "borderline/monitor"
    assert examples == load_prompts("borderline", split="monitor")
    assert read_prompts({"source": "harmful", "split": "score"}, "harmful", split="test")[0] == "harmful/score"


def test_a_file_is_read_whole_with_its_own_columns(file: Path) -> None:
    name, examples = read_prompts({"source": str(file), "prompt_column": "goal"}, "harmful", split="test")
    assert name == str(file)
    assert [example.prompt for example in examples] == [f"prompt {index}" for index in range(5)]


def test_examples_are_taken_as_they_are() -> None:
    rows = [Example("a"), Example("b")]
    assert read_prompts(rows, "harmful", split="test") == ("harmful", rows)


def test_a_limit_is_spread_over_the_set() -> None:
    rows = [Example(str(index)) for index in range(40)]
    assert [example.prompt for example in spread(rows, 4)] == ["5", "15", "25", "35"]
    for count in range(1, 41):
        assert len({example.prompt for example in spread(rows, count)}) == count
    assert spread(rows, 50) == rows
    _, few = read_prompts("harmful", "harmful", split="test", limit=20)
    assert len({example.category for example in few}) > 12


def test_bad_sources_are_named() -> None:
    with pytest.raises(TypeError, match=r"`harmful` expected to be a prompt set's name or path, .* but got 3"):
        read_prompts(3, "harmful", split="test")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"got `prompt_colum`\. Did you mean `prompt_column`"):
        read_prompts({"source": "harmful", "prompt_colum": "goal"}, "harmful", split="test")
    with pytest.raises(ValueError, match="`borderline` expected the key `source`"):
        read_prompts({"split": "test"}, "borderline", split="test")
    with pytest.raises(ValueError, match="`harmful` expected to hold at least one prompt"):
        read_prompts([], "harmful", split="test")
    with pytest.raises(ValueError, match="Did you mean `harmful`"):
        read_prompts("harmfull", "harmful", split="test")
