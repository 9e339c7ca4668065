# SPDX-License-Identifier: Apache-2.0
"""Tokenising text in which some parts are a template's and the others are only data."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# verbose=False: how long a text may be is the caller's question.
_OPTIONS = {"add_special_tokens": False, "verbose": False}


class Piece(NamedTuple):
    """A piece of text; control tokens in it count only if the template wrote it."""

    text: str
    from_template: bool


class Token(NamedTuple):
    """A token, and the characters of the text that it comes from: ``text[start:end]``.

    A tokenizer without offsets (a slow one) gives no span: start and end are equal.
    """

    id: int
    start: int
    end: int


def moved(tokens: Sequence[Token], by: int) -> list[Token]:
    """Return the tokens as those of a text in which theirs begins `by` characters later."""
    return [Token(token.id, token.start + by, token.end + by) for token in tokens]


def tokenize(tokenizer: PreTrainedTokenizerBase, pieces: Sequence[Piece], controls: re.Pattern[str]) -> list[int]:
    """Tokenise pieces as one text, in which only the template's control tokens are control tokens.

    Args:
        tokenizer: Adds nothing of its own (no beginning-of-text token: the template writes it).
        pieces: The text in order.
        controls: Matches the control tokens.

    Returns:
        What the tokenizer makes of the whole, if there are no control tokens in the data. Else every stretch between
        two of the template's control tokens is tokenised by itself as plain text.
    """
    whole = "".join(piece.text for piece in pieces)
    if [match.span() for match in controls.finditer(whole)] == list(_genuine(pieces, controls)):
        # Spans would more than double the time.
        return list(tokenizer(whole, split_special_tokens=False, **_OPTIONS)["input_ids"])
    return [token.id for token in tokenize_spans(tokenizer, pieces, controls)]


def tokenize_spans(
    tokenizer: PreTrainedTokenizerBase, pieces: Sequence[Piece], controls: re.Pattern[str]
) -> list[Token]:
    """Return the tokens of `tokenize` with the characters that they come from."""
    whole = "".join(piece.text for piece in pieces)
    genuine = list(_genuine(pieces, controls))
    if [match.span() for match in controls.finditer(whole)] == genuine:
        return _encode(tokenizer, whole)
    tokens: list[Token] = []
    start, strip_left = 0, False
    for first, last in [*genuine, (len(whole), len(whole))]:
        control_id = tokenizer.convert_tokens_to_ids(whole[first:last]) if last > first else None
        control = None if control_id is None else tokenizer.added_tokens_decoder[control_id]
        stretch = whole[start:first].lstrip() if strip_left else whole[start:first]
        start = first - len(stretch)
        stretch = stretch.rstrip() if control is not None and control.lstrip else stretch
        tokens += moved(_encode_plain(tokenizer, stretch, controls), start)
        if control_id is not None:
            tokens.append(Token(control_id, first, last))
        start, strip_left = last, control is not None and control.rstrip
    return tokens


def _genuine(pieces: Sequence[Piece], controls: re.Pattern[str]) -> Iterator[tuple[int, int]]:
    """Yield the spans, in the whole, of the control tokens that the template wrote."""
    offset = 0
    for piece in pieces:
        if piece.from_template:
            for match in controls.finditer(piece.text):
                yield offset + match.start(), offset + match.end()
        offset += len(piece.text)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, *, plain: bool = False) -> list[Token]:
    options = {**_OPTIONS, "split_special_tokens": plain}
    if not tokenizer.is_fast:
        return [Token(token_id, 0, 0) for token_id in tokenizer(text, **options)["input_ids"]]
    encoded = tokenizer(text, return_offsets_mapping=True, **options)
    return [
        Token(token_id, start, end)
        for token_id, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]


def _encode_plain(tokenizer: PreTrainedTokenizerBase, text: str, controls: re.Pattern[str]) -> list[Token]:
    """Tokenise text so that no control token comes out of it."""
    if not text:
        return []
    tokens = _encode(tokenizer, text, plain=True)
    strings = {match.group() for match in controls.finditer(text)}
    known = set(tokenizer.convert_tokens_to_ids(sorted(strings)))
    if not known.isdisjoint(token.id for token in tokens):
        # The tokenizer cannot leave this one out (an added token that is not marked special): take it apart.
        return [
            token
            for start, part in _cut(text, controls)
            for token in moved(_encode(tokenizer, part, plain=True), start)
        ]
    return tokens


def _cut(text: str, controls: re.Pattern[str]) -> Iterator[tuple[int, str]]:
    """Cut the text inside of each control token. Yields where each part starts, and the part."""
    start = 0
    while match := controls.search(text, start):
        yield start, text[start : match.start() + 1]
        start = match.start() + 1
    yield start, text[start:]
