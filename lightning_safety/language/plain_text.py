# SPDX-License-Identifier: Apache-2.0
"""Tokenising text in which some parts are a template's and the others are only data."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Piece(NamedTuple):
    """A piece of text; control tokens in it count only if the template wrote it."""

    text: str
    from_template: bool


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
    genuine = list(_genuine(pieces, controls))
    if [match.span() for match in controls.finditer(whole)] == genuine:
        return _encode(tokenizer, whole)
    token_ids: list[int] = []
    start, strip_left = 0, False
    for first, last in [*genuine, (len(whole), len(whole))]:
        stretch = whole[start:first]
        control_id = tokenizer.convert_tokens_to_ids(whole[first:last]) if last > first else None
        control = None if control_id is None else tokenizer.added_tokens_decoder[control_id]
        stretch = stretch.lstrip() if strip_left else stretch
        stretch = stretch.rstrip() if control is not None and control.lstrip else stretch
        token_ids += _encode_plain(tokenizer, stretch, controls)
        if control_id is not None:
            token_ids.append(control_id)
        start, strip_left = last, control is not None and control.rstrip
    return token_ids


def _genuine(pieces: Sequence[Piece], controls: re.Pattern[str]) -> Iterator[tuple[int, int]]:
    """Yield the spans, in the whole, of the control tokens that the template wrote."""
    offset = 0
    for piece in pieces:
        if piece.from_template:
            for match in controls.finditer(piece.text):
                yield offset + match.start(), offset + match.end()
        offset += len(piece.text)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, *, plain: bool = False) -> list[int]:
    # verbose=False: how long a text may be is the caller's question.
    encoded = tokenizer(text, add_special_tokens=False, split_special_tokens=plain, verbose=False)
    return list(encoded["input_ids"])


def _encode_plain(tokenizer: PreTrainedTokenizerBase, text: str, controls: re.Pattern[str]) -> list[int]:
    """Tokenise text so that no control token comes out of it."""
    if not text:
        return []
    token_ids = _encode(tokenizer, text, plain=True)
    strings = {match.group() for match in controls.finditer(text)}
    if strings and not set(token_ids).isdisjoint(tokenizer.convert_tokens_to_ids(sorted(strings))):
        # The tokenizer cannot leave this one out (an added token that is not marked special): take it apart.
        return [token_id for part in _cut(text, controls) for token_id in _encode(tokenizer, part, plain=True)]
    return token_ids


def _cut(text: str, controls: re.Pattern[str]) -> Iterator[str]:
    """Cut the text inside of each control token."""
    while match := controls.search(text):
        yield text[: match.start() + 1]
        text = text[match.start() + 1 :]
    yield text
