# SPDX-License-Identifier: Apache-2.0
"""Loading prompts: built-in sets, files and hub data sets."""

from __future__ import annotations

import json
import re

import datasets
import pytest

from lightning_safety.data import BUILT_IN_SETS, Example, load_prompts

ROWS = [
    {"split": "train", "category": "food", "prompt": "Bake bread", "response": "Knead it."},
    {"split": "test", "category": None, "prompt": "Boil an egg", "response": " "},
    {"split": "train", "prompt": "Fry rice", "response": "Stir."},
]


@pytest.fixture
def rows_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture
def hub(monkeypatch):
    """Stands for the hub: a function of (name, split), as `datasets.load_dataset`."""

    def set_answer(answer):
        def load_dataset(name, split=None):
            if isinstance(answer, Exception):
                raise answer
            return answer if split is None else answer[split]

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)

    return set_answer


@pytest.mark.parametrize("name", BUILT_IN_SETS)
def test_a_built_in_set_has_prompts_responses_and_categories(name):
    rows = load_prompts(name, split="test")
    assert all(row.prompt and row.response and row.category for row in rows)


@pytest.mark.parametrize(
    ("split", "message"),
    [
        (None, "splits of the built-in set 'harmful' but got None. Choose from `score`, `train`, `monitor`, `test`."),
        ("tset", "but got 'tset'. Did you mean `test`?"),
    ],
)
def test_a_built_in_set_needs_one_of_its_splits(split, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_prompts("harmful", split=split)


def test_borderline_prompts_are_not_scored():
    with pytest.raises(ValueError, match=re.escape("but got 'score'. Choose from `train`, `monitor`, `test`.")):
        load_prompts("borderline", split="score")


def test_a_file_is_read_in_order(rows_file):
    assert load_prompts(rows_file) == [
        Example("Bake bread", "Knead it.", "food"),
        Example("Boil an egg"),
        Example("Fry rice", "Stir."),
    ]


def test_a_file_is_filtered_by_its_split_column(rows_file):
    assert [row.prompt for row in load_prompts(str(rows_file), split="train")] == ["Bake bread", "Fry rice"]


def test_limit_takes_the_first_of_the_split(rows_file):
    assert [row.prompt for row in load_prompts(rows_file, split="train", limit=1)] == ["Bake bread"]


def test_no_responses_are_loaded_where_none_are_wanted(rows_file):
    assert {row.response for row in load_prompts(rows_file, response_column=None)} == {None}


def test_other_columns_can_be_named(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("goal,target\nBake bread,Knead it.\n")
    assert load_prompts(path, prompt_column="goal") == [Example("Bake bread")]
    assert load_prompts(path, prompt_column="goal", response_column="target") == [Example("Bake bread", "Knead it.")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "tests"}, "but got 'tests'. Did you mean `test`?"),
        ({"prompt_column": "goal"}, "`split`, `category`, `prompt`, `response`"),
        ({"response_column": "target"}, "`response_column` expected to be one of the columns"),
        ({"limit": 0}, "`limit` expected to be at least 1"),
    ],
)
def test_arguments_that_fit_no_row_are_refused(rows_file, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_prompts(rows_file, **arguments)


def test_a_split_needs_a_split_column(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a"}\n')
    with pytest.raises(ValueError, match=re.escape(f"({path}:1 has the columns `prompt`)")):
        load_prompts(path, split="train")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": ["a"]}, "`prompt` expected to be text but got list at"),
        ({"prompt": " \n"}, "`prompt` expected to be text but is missing or blank at"),
        ({"response": "b"}, "`prompt` expected to be text but is missing or blank at"),
        ({"prompt": "a", "response": 3}, "`response` expected to be text but got int at"),
        ({"prompt": "\ud800"}, "`prompt` expected to be valid Unicode at"),
    ],
)
def test_a_bad_row_is_named_by_its_line(tmp_path, row, message):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "good"}\n' + json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=re.escape(message) + ".*" + re.escape(f"{path}:2")):
        load_prompts(path)


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_file_is_refused(tmp_path, content):
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match="expected to hold at least one prompt"):
        load_prompts(path)


@pytest.mark.parametrize("source", ["harmfull", "nothing", "./prompts", "a/b/c"])
def test_an_unknown_source_lists_what_there_is(source):
    with pytest.raises(ValueError, match="`harmful`"):
        load_prompts(source)


def test_a_source_that_is_no_name_is_refused():
    with pytest.raises(TypeError, match="name of a prompt set or a path but got list"):
        load_prompts(["harmful"])


def test_a_missing_file_is_never_looked_for_on_the_hub(tmp_path, monkeypatch, hub):
    hub(AssertionError("asked the hub"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        load_prompts("owner/rows.jsonl")
    with pytest.raises(ValueError, match="`source` expected"):
        load_prompts("runs/prompts")


def test_a_hub_data_set_gives_its_split(hub):
    hub({"train": [{"text": "Bake bread"}], "test": [{"text": "Boil an egg", "category": 3}]})
    assert load_prompts("owner/name", split="test", prompt_column="text") == [Example("Boil an egg", None, "3")]


def test_a_hub_data_set_with_one_split_needs_no_name_of_it(hub):
    hub({"train": [{"prompt": "Bake bread", "response": "Knead it."}]})
    assert load_prompts("owner/name") == [Example("Bake bread", "Knead it.")]


def test_a_hub_data_set_with_several_splits_lists_them(hub):
    hub({"train": [], "test": []})
    with pytest.raises(ValueError, match="one of `train`, `test` of 'owner/name' but got None"):
        load_prompts("owner/name")


@pytest.mark.parametrize(
    ("answer", "error"), [(ConnectionError("no network"), FileNotFoundError), (ValueError("Unknown split"), ValueError)]
)
def test_a_hub_data_set_that_does_not_load_says_why(hub, answer, error):
    hub(answer)
    with pytest.raises(error, match=f"'owner/name' could not be loaded.*{answer}"):
        load_prompts("owner/name", split="train")


def test_a_bad_row_of_a_hub_data_set_is_named(hub):
    hub({"train": [{"prompt": "a"}, {"prompt": None}]})
    with pytest.raises(ValueError, match="row 1 of the data set 'owner/name'"):
        load_prompts("owner/name")
