# SPDX-License-Identifier: Apache-2.0
"""A model and an objective whose impact has a closed form."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lightning_safety.scoring import (
    ObjectiveBatch,
    SafetyObjective,
)

NO_TOKENIZER: Any = None


class MeanOutput(SafetyObjective):
    """S(x) = cᵀ W x: its gradient with respect to W is the outer product of c and x."""

    def __init__(self, inputs: Tensor, weights: Tensor) -> None:
        self.inputs, self.weights = inputs, weights

    def batches(self, tokenizer: Any, *, batch_size: int) -> list[ObjectiveBatch]:
        parts = self.inputs.split(batch_size)
        return [ObjectiveBatch({"inputs": part}, len(part)) for part in parts]

    def loss(self, model: nn.Module, batch: ObjectiveBatch) -> Tensor:
        return -(model(batch.tensors["inputs"]) @ self.weights).mean()


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 2)
        self.norm = nn.LayerNorm(2)

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = self.head(inputs)
        return output
