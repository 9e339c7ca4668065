# SPDX-License-Identifier: Apache-2.0
"""Tokenised examples, and how they become batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_safety.arguments import check_positive

IGNORED_LABEL = -100
"""The label of a token that carries no loss, as in ``torch.nn.functional.cross_entropy``."""


@dataclass(frozen=True)
class TokenizedExample:
    """One sequence of tokens.

    Attributes:
        input_ids: The tokens.
        labels: The same tokens where they are learned, -100 elsewhere. Not shifted.
    """

    input_ids: list[int]
    labels: list[int]

    def __post_init__(self) -> None:
        if len(self.input_ids) != len(self.labels):
            raise ValueError(
                f"`labels` expected to be as long as `input_ids` ({len(self.input_ids)}) but got {len(self.labels)}."
            )


def pad_batch(rows: Sequence[TokenizedExample], *, pad_token_id: int, padding_side: str = "right") -> dict[str, Tensor]:
    """Stack sequences of different lengths, padded to the longest.

    Args:
        rows: At least one sequence.
        pad_token_id: The token to pad with. Its label is -100 and its attention 0, so it may be a token that means
            something elsewhere.
        padding_side: ``"right"`` for training, ``"left"`` for generation.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels``, each int64 of shape [batch, length].

    Raises:
        ValueError: No rows, or another padding side.

    Example:
        >>> rows = [TokenizedExample([5, 6, 7], [-100, 6, 7]), TokenizedExample([8], [8])]
        >>> pad_batch(rows, pad_token_id=0)["input_ids"].tolist()
        [[5, 6, 7], [8, 0, 0]]
    """
    if not rows:
        raise ValueError("`rows` expected to hold at least one example but it is empty.")
    if padding_side not in ("left", "right"):
        raise ValueError(f"`padding_side` expected to be 'left' or 'right' but got {padding_side!r}.")
    length = max(len(row.input_ids) for row in rows)

    def pad(values: list[int], filler: int) -> list[int]:
        filling = [filler] * (length - len(values))
        return filling + values if padding_side == "left" else values + filling

    return {
        "input_ids": torch.tensor([pad(row.input_ids, pad_token_id) for row in rows], dtype=torch.int64),
        "attention_mask": torch.tensor([pad([1] * len(row.input_ids), 0) for row in rows], dtype=torch.int64),
        "labels": torch.tensor([pad(row.labels, IGNORED_LABEL) for row in rows], dtype=torch.int64),
    }


def length_buckets(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Group indices into batches of similar length, so that little is padded.

    The longest come first: whatever does not fit in memory fails at once. Equal lengths keep their order.

    Args:
        lengths: The length of each sequence.
        batch_size: At most so many in a batch; only the last batch may hold fewer.

    Returns:
        Batches of indices into `lengths`; each index occurs once.

    Example:
        >>> length_buckets([3, 9, 4, 9], batch_size=2)
        [[1, 3], [2, 0]]
    """
    check_positive(batch_size, "batch_size")
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
