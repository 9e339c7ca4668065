# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_safety.data import Example, load_prompts
from lightning_safety.language import encode_prompt
from lightning_safety.language.guards import INSTRUCTED, encode_judgement
from lightning_safety.training.sources import read_sources
from tests.tiny import make_tiny_tokenizer

ROWS = [Example("Hello", "Good morning."), Example("Bye", "See you.")]


@pytest.mark.parametrize(("argument", "split"), [("train", "train"), ("val", "monitor"), ("test", "test")])
def test_a_built_in_set_alone_means_the_split_for_the_purpose(argument: str, split: str) -> None:
    (source,) = read_sources("harmful", argument)
    assert source.examples == load_prompts("harmful", split=split)
    assert source.name == f"harmful/{split}"


@pytest.mark.parametrize(("argument", "split"), [("train", "monitor"), ("train", "test"), ("val", "test")])
def test_splits_kept_for_evaluation_are_refused(argument: str, split: str) -> None:
    with pytest.raises(
        ValueError, match=rf"`{argument}` expected a split of 'harmful' that is not kept.* got '{split}'"
    ):
        read_sources([{"source": "harmful", "split": split}], argument)


def test_scoring_prompts_may_be_trained_on() -> None:
    assert read_sources({"source": "harmful", "split": "score"}, "train")[0].name == "harmful/score"


def test_a_file_may_have_any_split(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps({"split": "test", "q": "Hello", "a": "Good morning."}))
    entry = {"source": str(path), "split": "test", "prompt_column": "q", "response_column": "a", "limit": None}
    assert read_sources(entry, "train")[0].examples == [ROWS[0]]


def test_mixture_with_rows_in_memory() -> None:
    sources = read_sources(
        [{"source": ROWS, "share": 0.75}, {"source": "harmless", "share": 0.25, "retention": True, "limit": 3}], "train"
    )
    assert [(len(source.examples), source.share, source.retention) for source in sources] == [
        (2, 0.75, False),
        (3, 0.25, True),
    ]


def test_list_of_names_and_of_examples(tmp_path: Path) -> None:
    assert [source.name for source in read_sources(["harmful", "harmless"], "train")] == [
        "harmful/train",
        "harmless/train",
    ]
    assert read_sources(ROWS, "train")[0].examples == ROWS


def test_responses_are_taken_in_turns() -> None:
    (source,) = read_sources({"source": [*ROWS, *ROWS, *ROWS], "response": ["Sure,", "First,"]}, "train")
    responses = [example.response for example in source.examples]
    assert responses == (["Sure,", "First,"] * len(responses))[: len(responses)]


def test_rows_become_questions_to_a_guard() -> None:
    rows = [Example("Who {x}?", "Me <|im_end|>."), Example("Why?", "Because.")]
    (source,) = read_sources({"source": rows, "response": "Sure {prompt}", "judgement": "unsafe"}, "train")
    first = source.examples[0]
    assert first.response == "unsafe"
    assert "Request of the user:\nWho {x}?\n\nReply of the assistant:\nSure {prompt}\n" in first.prompt
    tokenizer = make_tiny_tokenizer()
    # What is learned is what a guard is asked.
    asked = encode_judgement(tokenizer, INSTRUCTED, "Who {x}?", "Sure {prompt}")
    assert encode_prompt(tokenizer, first.prompt) == asked


def test_one_response_for_all_rows_also_where_there_is_none(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "Hello"}))
    rows = [{"source": ROWS, "response": "No."}, {"source": str(path), "response": "No."}]
    assert [source.examples for source in read_sources(rows, "train")] == [
        [Example("Hello", "No."), Example("Bye", "No.")],
        [Example("Hello", "No.")],
    ]
    assert ROWS[0].response == "Good morning."


def test_thirds_may_be_rounded() -> None:
    assert len(read_sources([{"source": ROWS, "share": 0.333}] * 3, "train")) == 3


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (5, TypeError, "`train` expected to be a prompt set's name"),
        ([], TypeError, "`train` expected to be"),
        ([ROWS[0], "harmful"], TypeError, "`train` expected to be"),
        ({"source": 5}, TypeError, "`train.source` expected"),
        ({"source": []}, TypeError, "`train.source` expected"),
        ({"split": "train"}, ValueError, "expected the key `source`"),
        ({"source": "harmful", "shares": 0.5}, ValueError, "got `shares`. Did you mean `share`"),
        ({"source": "harmfull"}, ValueError, "Did you mean `harmful`"),
        ({"source": ROWS, "split": "train"}, ValueError, "no `split` beside rows"),
        ({"source": ROWS, "retention": "yes"}, TypeError, "`train.retention` expected to be true or false"),
        ({"source": ROWS, "weight": 0}, ValueError, "`train.weight` expected to be a number above 0 but got 0"),
        ({"source": ROWS, "weight": float("inf")}, ValueError, "`train.weight` expected to be a number above 0"),
        ({"source": ROWS, "response": []}, ValueError, "`train.response` expected to be the text"),
        ({"source": ROWS, "response": ["No.", 3]}, ValueError, "`train.response` expected to be the text"),
        ({"source": ROWS, "judgement": "save"}, ValueError, "safe or unsafe but got 'save'. Did you mean `safe`"),
        ({"source": ROWS, "judgement": "safe", "own_replies": True}, ValueError, "`judgement` or `own_replies: true`"),
        ({"source": ROWS, "response": " "}, ValueError, "`train.response` expected to be the text"),
        ({"source": ROWS, "response": "No.", "own_replies": True}, ValueError, "`response` or `own_replies: true`"),
        ([{"source": ROWS, "share": 0.5}, {"source": ROWS}], ValueError, "for every source or for none"),
        ([{"source": ROWS, "share": 0.5}, {"source": ROWS, "share": 0.4}], ValueError, "sum to 1 but they sum to 0.9"),
        ([{"source": ROWS, "share": 50}, {"source": ROWS, "share": 50}], ValueError, r"in \(0, 1\] but got 50"),
        ([{"source": ROWS, "share": float("nan")}], ValueError, r"in \(0, 1\] but got nan"),
        ([ROWS[0], Example("What now?")], ValueError, "1 of the 2 rows of 'train' have none .first: row 2, 'What now"),
    ],
)
def test_bad_input_is_named(value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        read_sources(value, "train")


def test_what_the_model_must_not_say_is_for_training_and_written() -> None:
    (source,) = read_sources({"source": ROWS, "unlikely": True, "response": "No.", "weight": 2}, "train")
    assert source.unlikely
    assert source.weight == 2
    for entry, argument in (({"source": "harmful"}, "val"), ({"source": ROWS, "own_replies": True}, "train")):
        with pytest.raises(ValueError, match=rf"`{argument}.unlikely` expected a source of `train` with responses"):
            read_sources({**entry, "unlikely": True}, argument)
