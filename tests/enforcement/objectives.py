# SPDX-License-Identifier: Apache-2.0
"""A safety objective without a tokenizer: rows of token ids, whose likelihood is the score."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_safety.scoring import ObjectiveBatch, SafetyObjective


class TokenRows(SafetyObjective):
    """Each row is an example, and the loss its mean negative log-probability per token."""

    def __init__(self, rows: Sequence[Sequence[int]] = ((3, 4, 5, 6), (9, 8, 7, 6), (11, 3, 11, 3))) -> None:
        self.rows = [list(row) for row in rows]
        self.seen: list[list[int]] = []

    def batches(self, tokenizer: Any, *, batch_size: int) -> list[ObjectiveBatch]:
        groups = [self.rows[start : start + batch_size] for start in range(0, len(self.rows), batch_size)]
        return [ObjectiveBatch({"input_ids": torch.tensor(group)}, len(group)) for group in groups]

    def loss(self, model: nn.Module, batch: ObjectiveBatch) -> Tensor:
        ids = batch.tensors["input_ids"]
        self.seen += ids.tolist()
        loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
        return loss


class Opposed(TokenRows):
    """Some rows ask for the opposite of likelihood, so that a task that raises it points against them."""

    def loss(self, model: nn.Module, batch: ObjectiveBatch) -> Tensor:
        sign = -1 if int(batch.tensors["input_ids"][0, 0]) == 9 else 1
        return super().loss(model, batch) * sign


class Broken(TokenRows):
    """The loss, or its gradient alone, is not finite."""

    def __init__(self, *, gradient_only: bool = False) -> None:
        super().__init__()
        self.gradient_only = gradient_only

    def loss(self, model: nn.Module, batch: ObjectiveBatch) -> Tensor:
        loss = super().loss(model, batch)
        if not self.gradient_only:
            return loss * float("nan")
        # The square root of zero has no finite derivative.
        return loss + (loss - loss).sqrt()


class Elsewhere(TokenRows):
    """A loss in which the model has no part."""

    def loss(self, model: nn.Module, batch: ObjectiveBatch) -> Tensor:
        return torch.ones((), requires_grad=True) * 2
