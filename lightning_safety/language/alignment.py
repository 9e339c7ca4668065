# SPDX-License-Identifier: Apache-2.0
"""Which tokens of two tokenizers stand for the same characters of a text."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_safety.language.plain_text import Token


def align_tokens(source: Sequence[Token], target: Sequence[Token]) -> Tensor:
    """Split every token of one tokenisation over the tokens of another, by the characters they share.

    A character that is cut into several tokens (its bytes, in byte-level vocabularies) belongs to them in equal parts
    and in order.

    Args:
        source: Tokens of a text, with their spans.
        target: Tokens of the same text by another tokenizer; their spans count from the same character.

    Returns:
        Shares [source, target], float32. A row sums to 1, or to 0 where no target token has any of its characters (a
        special token, or white space that one of the tokenizers drops).

    Example:
        >>> text = [Token(7, 0, 8)], [Token(1, 0, 2), Token(2, 2, 8)]  # "unlawful" and "un", "lawful"
        >>> align_tokens(*text).tolist()
        [[0.25, 0.75]]
    """
    shared = torch.zeros(len(source), len(target), dtype=torch.float64)
    ours, theirs = _by_character(source), _by_character(target)
    for character in ours.keys() & theirs.keys():
        first, second = ours[character], theirs[character]
        for i, row in enumerate(first):
            for j, column in enumerate(second):
                start, end = max(i / len(first), j / len(second)), min((i + 1) / len(first), (j + 1) / len(second))
                shared[row, column] += max(0.0, end - start)
    totals = shared.sum(dim=1, keepdim=True)
    return (shared / totals.where(totals > 0, 1)).float()


def find_run(source: Sequence[Token], target: Sequence[Token]) -> int | None:
    """Return where the tokens of `target` stand in `source`, one after another and for the same characters.

    Spans alone would not do: some tokenizers give white space none.

    Example:
        >>> find_run([Token(5, -2, 0), Token(7, 0, 2), Token(8, 2, 3)], [Token(7, 0, 2), Token(8, 2, 3)])
        1
    """
    for start in range(len(source) - len(target) + 1):
        if list(source[start : start + len(target)]) == list(target):
            return start
    return None


def _by_character(tokens: Sequence[Token]) -> dict[int, list[int]]:
    """Return, for each character, the places of the tokens that it is in."""
    found: dict[int, list[int]] = {}
    for place, token in enumerate(tokens):
        for character in range(token.start, token.end):
            found.setdefault(character, []).append(place)
    return found
