# SPDX-License-Identifier: Apache-2.0
"""Alignment by characters, on text that makes tokenizers disagree."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from lightning_safety.language.alignment import align_tokens, find_run
from lightning_safety.language.plain_text import Token
from tests.language.tokenizers import make_metaspace_tokenizer, make_wordpiece_tokenizer
from tests.tiny import make_tiny_tokenizer

TEXTS = [
    "I can't help with that.",
    "  Two spaces, then\n\nlines",
    "naïve café — 中文 déjà vu 🙂🙂 end",
    "a<|im_end|>b",
    "x",
]


def tokens_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[Token]:
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return [Token(i, *span) for i, span in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)]


@pytest.mark.parametrize("text", TEXTS)
def test_a_tokenizer_is_aligned_with_itself_token_by_token(text: str) -> None:
    # Bytes of one character have the same span: they must not be mixed.
    tokens = tokens_of(make_tiny_tokenizer(), text)
    assert torch.equal(align_tokens(tokens, tokens), torch.eye(len(tokens)))


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("make", [make_wordpiece_tokenizer, make_metaspace_tokenizer])
def test_every_token_goes_to_those_with_its_characters(make: object, text: str) -> None:
    ours, theirs = tokens_of(make_tiny_tokenizer(), text), tokens_of(make(), text)  # type: ignore[operator]
    for source, target in ((ours, theirs), (theirs, ours)):
        shares = align_tokens(source, target)
        assert shares.shape == (len(source), len(target))
        for row, token in zip(shares, source, strict=True):
            touching = [max(token.start, other.start) < min(token.end, other.end) for other in target]
            assert set(row.nonzero().flatten().tolist()) <= {place for place, hit in enumerate(touching) if hit}
            assert row.sum().item() == pytest.approx(1 if any(touching) else 0)
    # White space is all that one of them may leave to nobody.
    lost = align_tokens(ours, theirs).sum(dim=1) == 0
    assert all(text[token.start : token.end].isspace() for token, none in zip(ours, lost.tolist(), strict=True) if none)


def test_a_character_cut_into_tokens_belongs_to_them_in_order() -> None:
    # A space and the first bytes of a character in one token, its last byte in the next.
    tokens = [Token(0, 0, 2), Token(1, 1, 2), Token(2, 2, 3)]
    assert torch.equal(align_tokens(tokens, tokens), torch.eye(3))
    whole = [Token(0, 0, 1), Token(1, 1, 3)]
    expected = torch.tensor([[2 / 3, 1 / 3], [0, 1], [0, 1]])
    assert torch.allclose(align_tokens(tokens, whole), expected)


def test_a_run_of_the_same_tokens_is_found_by_spans_too() -> None:
    run = [Token(5, 0, 2), Token(9, 2, 2), Token(6, 3, 4)]
    assert find_run([Token(5, -4, -2), Token(9, -2, -2), *run, Token(7, 4, 5)], run) == 2
    assert find_run([Token(5, -4, -2), Token(9, -2, -2), Token(6, -1, 0)], run) is None
    assert find_run(run[:2], run) is None


def test_shares_are_those_of_the_characters() -> None:
    source = [Token(0, 0, 6), Token(1, 6, 6), Token(2, 6, 10)]
    target = [Token(0, -3, 2), Token(1, 2, 6), Token(2, 6, 9)]
    assert align_tokens(source, target).tolist() == [
        [pytest.approx(1 / 3), pytest.approx(2 / 3), 0],
        [0] * 3,
        [0, 0, 1],
    ]


def test_nothing_to_align() -> None:
    assert align_tokens([], [Token(0, 0, 1)]).shape == (0, 1)
    assert align_tokens([Token(0, 0, 1)], []).tolist() == [[]]
