# SPDX-License-Identifier: Apache-2.0
"""Which tokens of two tokenizers stand for the same characters of a text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor

from lightning_safety.language.plain_text import Token


def align_tokens(source: Sequence[Token], target: Sequence[Token]) -> Tensor:
    """Split every token of one tokenisation over the tokens of another, by the characters they share.

    Args:
        source: Tokens of a text, with their spans.
        target: Tokens of the same text by another tokenizer; their spans count from the same character.

    Returns:
        Shares [source, target], float32. A row sums to 1, or to 0 where no target token has any of its characters (a
        special token, or white space that the other tokenizer drops).

    Example:
        >>> text = [Token(7, 0, 6)], [Token(1, 0, 2), Token(2, 2, 6)]  # "unsafe" and "un", "safe"
        >>> align_tokens(*text).round(decimals=2).tolist()
        [[0.33, 0.67]]
    """
    shared = torch.zeros(len(source), len(target), dtype=torch.float64)
    if source and target:
        ours, theirs = (torch.tensor(list(_spans(tokens)), dtype=torch.float64) for tokens in (source, target))
        starts = torch.maximum(ours[:, None, 0], theirs[None, :, 0])
        ends = torch.minimum(ours[:, None, 1], theirs[None, :, 1])
        shared = (ends - starts).clamp(min=0)
    totals = shared.sum(dim=1, keepdim=True)
    return (shared / totals.where(totals > 0, 1)).float()


def _spans(tokens: Sequence[Token]) -> Iterator[tuple[float, float]]:
    """Yield the spans; tokens of one and the same (bytes of a character) share it in order."""
    for (start, end), group in groupby(tokens, key=lambda token: (token.start, token.end)):
        count = len(list(group))
        for number in range(count):
            yield start + (end - start) * number / count, start + (end - start) * (number + 1) / count
