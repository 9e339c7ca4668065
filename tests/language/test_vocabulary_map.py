# SPDX-License-Identifier: Apache-2.0
"""The vocabulary map against tokenising every token's text by itself."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from lightning_safety.language.vocabulary_map import check_fast, same_vocabulary, vocabulary_map
from tests.language.tokenizers import make_metaspace_tokenizer, make_wordpiece_tokenizer
from tests.tiny import make_tiny_tokenizer

Make = Callable[[], PreTrainedTokenizerFast]
MAKERS: list[Make] = [make_tiny_tokenizer, make_wordpiece_tokenizer, make_metaspace_tokenizer]


def special_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    return [token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special]


@pytest.mark.parametrize("make", MAKERS)
def test_identical_tokenizers_map_every_token_to_itself(make: Make) -> None:
    tokenizer = make()
    shares = vocabulary_map(tokenizer, copy.deepcopy(tokenizer)).to_dense()
    expected = torch.eye(len(shares))
    expected[special_ids(tokenizer)] = 0
    assert torch.equal(shares, expected)


@pytest.mark.parametrize("source", MAKERS)
@pytest.mark.parametrize("target", MAKERS)
def test_rows_are_shares(source: Make, target: Make) -> None:
    first, second = source(), target()
    shares = vocabulary_map(first, second)
    assert shares.shape == (len(first), len(second))
    assert shares.is_coalesced()
    sums = shares.to_dense().sum(dim=1)
    assert torch.all((sums - 1).abs().minimum(sums.abs()) < 1e-6)
    assert not shares.to_dense()[special_ids(first)].any()
    assert not shares.to_dense()[:, special_ids(second)].any()
    # Left out is what the other cannot write: special tokens, and characters or parts of them that it does not know.
    for token_id in set((sums == 0).nonzero().flatten().tolist()) - set(special_ids(first)):
        text = first.decode([token_id])
        written = second(text, add_special_tokens=False)["input_ids"]
        assert "\ufffd" in text or not text.strip() or set(written) <= set(special_ids(second)), text


def test_words_and_their_continuations_are_told_apart() -> None:
    byte_level, wordpiece = make_tiny_tokenizer(), make_wordpiece_tokenizer()
    ours, theirs = byte_level.get_vocab(), wordpiece.get_vocab()
    shares = vocabulary_map(byte_level, wordpiece).to_dense()
    assert shares[ours["ing"]].argmax() == theirs["##ing"]
    assert shares[ours["Ġthat"]].argmax() == theirs["that"]
    back = vocabulary_map(wordpiece, byte_level).to_dense()
    assert back[theirs["##ing"]].argmax() == ours["ing"]
    assert back[theirs["that"]].argmax() == ours["Ġthat"]


def test_a_token_the_other_has_not_is_split_evenly() -> None:
    large, small = make_tiny_tokenizer(900), make_tiny_tokenizer(400)
    shares = vocabulary_map(large, small).to_dense()
    known = small.get_vocab()
    split = [(token, i) for token, i in large.get_vocab().items() if token not in known and token.isascii()]
    assert len(split) > 50
    for token, token_id in split:
        parts = small.backend_tokenizer.encode(large.decode([token_id])).ids
        assert len(parts) > 1, token
        expected = torch.zeros(shares.shape[1])
        for part in parts:
            expected[part] += 1 / len(parts)
        assert torch.allclose(shares[token_id], expected), token


def test_parts_of_a_character_go_by_name() -> None:
    byte_level, larger = make_tiny_tokenizer(400), make_tiny_tokenizer(900)
    part = byte_level("中", add_special_tokens=False)["input_ids"]
    assert len(part) == 3
    shares = vocabulary_map(byte_level, larger).to_dense()
    names = byte_level.convert_ids_to_tokens(part)
    assert [int(row.argmax()) for row in shares[part]] == larger.convert_tokens_to_ids(names)
    assert not vocabulary_map(byte_level, make_wordpiece_tokenizer()).to_dense()[part].any()


def test_bytes_to_fall_back_on_are_no_text() -> None:
    tokenizer = make_metaspace_tokenizer()
    with_bytes = copy.deepcopy(tokenizer)
    with_bytes.add_tokens(["<0x41>", "<0x42>"])
    shares = vocabulary_map(with_bytes, tokenizer).to_dense()
    assert not shares[with_bytes.convert_tokens_to_ids("<0x41>")].any()
    back = vocabulary_map(with_bytes, with_bytes).to_dense()
    assert back[with_bytes.convert_tokens_to_ids("<0x41>")].argmax() == with_bytes.convert_tokens_to_ids("<0x41>")


def test_same_vocabulary() -> None:
    assert same_vocabulary(make_tiny_tokenizer(), make_tiny_tokenizer())
    assert not same_vocabulary(make_tiny_tokenizer(), make_wordpiece_tokenizer())


def test_slow_tokenizers_are_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="`guard` expected to be a fast tokenizer but Slow is slow"):
        check_fast(Slow(), "guard")  # type: ignore[arg-type]
