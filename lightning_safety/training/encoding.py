# SPDX-License-Identifier: Apache-2.0
"""Rows of text as rows of tokens, cut to length without losing a response in silence."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning_safety.data import IGNORED_LABEL, Example, TokenizedExample
from lightning_safety.language import encode_example
from lightning_safety.progress import track

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MINIMUM_RESPONSE_TOKENS = 8
"""A row is left out if `max_length` leaves room for fewer tokens of its response than this, and the rest is longer."""


def encode_examples(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str = "examples",
    max_length: int | None = None,
    max_response_tokens: int | None = None,
    show_progress: bool = True,
) -> list[TokenizedExample]:
    """Tokenise (prompt, response) pairs through the chat template; only response and end-of-turn token are learned.

    Args:
        examples: Each has a response.
        tokenizer: Has a chat template.
        name: Where the examples come from, for messages.
        max_length: Rows longer than this are cut at the end, and counted in a warning. A row whose prompt leaves room
            for fewer than 8 tokens of a longer response is left out, and counted in a warning too.
        max_response_tokens: Keep only the first so many tokens of each response. A response that is cut, here or by
            `max_length`, has no end-of-turn token: the model must not learn to stop there.
        show_progress: Whether to show a progress bar if it takes over two seconds.

    Returns:
        The rows that fit, in order.

    Raises:
        ValueError: No row fits.
    """
    rows, cut = [], 0
    for example in track(examples, f"tokenizing {name}", total=len(examples), enabled=show_progress):
        whole = encode_example(tokenizer, example.prompt, example.response or "")
        if max_response_tokens is not None:
            whole = _keep_first(whole, max_response_tokens)
        row = whole if max_length is None else _fit(whole, max_length)
        if row is not None:
            cut += len(_learned(row)) < len(_learned(whole))
            rows.append(row)
    dropped = len(examples) - len(rows)
    if not rows:
        raise ValueError(
            f"`max_length` expected to leave room for a response but the prompts of all {dropped} rows of {name!r} "
            f"need more than {max_length} tokens. Raise `max_length`."
        )
    if dropped:
        warnings.warn(
            f"{dropped} of {len(examples)} rows of {name!r} are left out: their prompts leave no room for a response "
            f"in `max_length={max_length}` tokens.",
            stacklevel=2,
        )
    if cut:
        warnings.warn(
            f"{cut} of {len(examples)} responses of {name!r} are cut to `max_length={max_length}` tokens and learned "
            f"without their end-of-turn token.",
            stacklevel=2,
        )
    return rows


def _learned(row: TokenizedExample) -> list[int]:
    """Return the places of the response and its end-of-turn token, which is the last of them."""
    return [place for place, label in enumerate(row.labels) if label != IGNORED_LABEL]


def _keep_first(row: TokenizedExample, tokens: int) -> TokenizedExample:
    """Cut after the first `tokens` tokens of the response, unless it is no longer than that."""
    learned = _learned(row)
    response = len(learned) - 1
    return row if response <= tokens else _cut(row, learned[tokens])


def _fit(row: TokenizedExample, max_length: int) -> TokenizedExample | None:
    """Cut to `max_length`, or return None if too little of the response is left."""
    if len(row.input_ids) <= max_length:
        return row
    learned = _learned(row)
    left = sum(place < max_length for place in learned)
    return None if left < min(MINIMUM_RESPONSE_TOKENS, len(learned)) else _cut(row, max_length)


def _cut(row: TokenizedExample, length: int) -> TokenizedExample:
    return TokenizedExample(row.input_ids[:length], row.labels[:length])
