# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import warnings
from typing import Any

import pytest

from lightning_safety.data import Example, TokenizedExample
from lightning_safety.training.encoding import encode_examples

SHORT = Example("Hello", "Good morning.")
LONG = Example("Count", " ".join(str(number) for number in range(60)))


def encode(tokenizer: Any, *examples: Example, **options: Any) -> list[TokenizedExample]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return encode_examples(examples, tokenizer, **options)


def learned(row: TokenizedExample) -> list[int]:
    return [label for label in row.labels if label != -100]


def test_exactly_the_response_and_its_end_are_learned(tiny_tokenizer: Any) -> None:
    (row,) = encode(tiny_tokenizer, SHORT)
    text = tiny_tokenizer.decode(row.input_ids)
    assert text.startswith("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nGood morning.<|im_end|>")
    assert tiny_tokenizer.decode(learned(row)) == "Good morning.<|im_end|>"
    assert learned(row)[-1] == tiny_tokenizer.eos_token_id
    assert all(label in (-100, token) for token, label in zip(row.input_ids, row.labels, strict=True))


def test_only_the_first_response_tokens_are_kept_without_an_end(tiny_tokenizer: Any) -> None:
    (whole,) = encode(tiny_tokenizer, LONG)
    (row,) = encode(tiny_tokenizer, LONG, max_response_tokens=5)
    assert learned(row) == learned(whole)[:5]
    assert row.input_ids == whole.input_ids[: len(row.input_ids)]
    assert row.labels[-5:] == row.input_ids[-5:]


def test_a_response_of_just_the_length_keeps_its_end(tiny_tokenizer: Any) -> None:
    (whole,) = encode(tiny_tokenizer, SHORT)
    tokens = len(learned(whole)) - 1
    assert encode(tiny_tokenizer, SHORT, max_response_tokens=tokens) == [whole]
    (cut,) = encode(tiny_tokenizer, SHORT, max_response_tokens=tokens - 1)
    assert learned(cut) == learned(whole)[: tokens - 1]


def test_cut_responses_are_counted_and_have_no_end(tiny_tokenizer: Any) -> None:
    with pytest.warns(UserWarning, match=r"1 of 2 responses of 'rows' are cut to `max_length=50` tokens"):
        short, long = encode_examples([SHORT, LONG], tiny_tokenizer, name="rows", max_length=50)
    assert learned(short)[-1] == tiny_tokenizer.eos_token_id
    assert len(long.input_ids) == 50
    assert tiny_tokenizer.eos_token_id not in learned(long)


def test_prompts_without_room_for_a_response_are_left_out_and_counted(tiny_tokenizer: Any) -> None:
    crowded = Example(LONG.response or "", SHORT.response)
    with pytest.warns(UserWarning, match="1 of 2 rows of 'rows' are left out: their prompts leave no room") as caught:
        rows = encode_examples([SHORT, crowded], tiny_tokenizer, name="rows", max_length=50)
    assert rows == encode(tiny_tokenizer, SHORT)
    assert len(caught) == 1


def test_nothing_left_is_an_error(tiny_tokenizer: Any) -> None:
    with pytest.raises(
        ValueError, match=r"`max_length` expected to leave room .* all 1 rows of 'rows' need more than 5"
    ):
        encode(tiny_tokenizer, SHORT, name="rows", max_length=5)


def test_a_row_of_just_the_length_is_whole(tiny_tokenizer: Any) -> None:
    (whole,) = encode(tiny_tokenizer, SHORT)
    learned_end = max(place for place, label in enumerate(whole.labels) if label != -100) + 1
    (row,) = encode(tiny_tokenizer, SHORT, max_length=learned_end)
    assert learned(row) == learned(whole)


@pytest.mark.parametrize("room", [7, 8])
def test_at_least_eight_tokens_of_a_response_remain(tiny_tokenizer: Any, room: int) -> None:
    (whole,) = encode(tiny_tokenizer, LONG)
    length = next(place for place, label in enumerate(whole.labels) if label != -100) + room
    with pytest.warns(UserWarning, match="1 of 2") as caught:
        rows = encode_examples([Example("A", "B"), LONG], tiny_tokenizer, max_length=length)
    assert len(rows) == (2 if room == 8 else 1)
    assert ("cut" if room == 8 else "left out") in str(caught[0].message)
