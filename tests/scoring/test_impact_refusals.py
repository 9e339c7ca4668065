# SPDX-License-Identifier: Apache-2.0
"""What cannot be scored is refused, with the batch, the tensor or the argument named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_safety.scoring import (
    ObjectiveBatch,
    expected_safety_impact,
)
from tests.scoring.linear import NO_TOKENIZER, Linear, MeanOutput


class Checkpointed(Linear):
    """A user's own checkpointing, which does not care about the mode."""

    def __init__(self, *, use_reentrant: bool) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant

    def forward(self, inputs: Tensor) -> Tensor:
        inputs = inputs.clone().requires_grad_()
        output: Tensor = checkpoint(self.head, inputs, use_reentrant=self.use_reentrant)
        return output


def test_gradient_checkpointing_of_the_user() -> None:
    objective = MeanOutput(torch.randn(4, 3), torch.randn(2))
    model = Checkpointed(use_reentrant=False)
    plain = Linear()
    plain.load_state_dict(model.state_dict())
    expected = expected_safety_impact(plain, objective, NO_TOKENIZER)["head.weight"]
    assert torch.equal(expected_safety_impact(model, objective, NO_TOKENIZER)["head.weight"], expected)
    with pytest.raises(RuntimeError, match="Reentrant gradient checkpointing hides the weights"):
        expected_safety_impact(Checkpointed(use_reentrant=True), objective, NO_TOKENIZER)


def with_nan_weight(model: Linear) -> None:
    model.head.weight.data[0, 0] = torch.nan


class RootOfZero(MeanOutput):
    """Finite, with an infinite gradient, in the second batch only."""

    def loss(self, model: nn.Module, batch: ObjectiveBatch) -> Tensor:
        output = super().loss(model, batch)
        return (output - output.detach()).abs().sqrt() if bool((batch.tensors["inputs"] > 2).any()) else output


class Detached(MeanOutput):
    def loss(self, model: nn.Module, batch: ObjectiveBatch) -> Tensor:
        return super().loss(model, batch).detach()


class Constant(MeanOutput):
    def loss(self, model: nn.Module, batch: ObjectiveBatch) -> Tensor:
        return super().loss(model, batch) * 0


def nothing(model: Linear) -> None:
    """Leave the model as it is."""


INPUTS = torch.tensor([[1.0, 1.0, 1.0], [3.0, 1.0, 1.0]])


@pytest.mark.parametrize(
    ("objective", "prepare", "message"),
    [
        (MeanOutput, with_nan_weight, "The loss of `objective` is nan in batch 1 of 2"),
        (RootOfZero, nothing, "The gradient of `head.weight` is not finite in batch 2 of 2, although the loss is 0"),
        (Detached, nothing, "does not depend on the weights"),
        (Constant, nothing, "zero for every weight"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    objective: type[MeanOutput], prepare: Callable[[Linear], None], message: str
) -> None:
    model = Linear()
    prepare(model)
    with pytest.raises(RuntimeError, match=message):
        expected_safety_impact(model, objective(INPUTS, torch.ones(2)), NO_TOKENIZER, batch_size=1)


class Paired(MeanOutput):
    def batches(self, tokenizer: Any, *, batch_size: int) -> list[ObjectiveBatch]:
        return super().batches(tokenizer, batch_size=2)


@pytest.mark.parametrize(
    ("objective", "arguments", "message"),
    [
        (
            MeanOutput,
            {"reduction": "sined"},
            "`reduction` expected to be one of 'signed', 'absolute' .*Did you mean `signed`",
        ),
        (MeanOutput, {"scale": "sd"}, "`scale` expected to be one of 'std', 'magnitude', 'none' but got 'sd'"),
        (MeanOutput, {"batch_size": 0}, "`batch_size` expected to be at least 1"),
        (MeanOutput, {"include": "*v_proj*"}, "`include` expected to match"),
        (Paired, {"reduction": "absolute"}, "one example a batch .* batch 1 of 1 holds 2"),
    ],
)
def test_bad_arguments_are_refused(objective: type[MeanOutput], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        expected_safety_impact(Linear(), objective(INPUTS, torch.ones(2)), NO_TOKENIZER, **arguments)


def test_an_objective_without_examples_is_refused() -> None:
    with pytest.raises(ValueError, match="expected to have examples but has no batch"):
        expected_safety_impact(Linear(), NoBatches(INPUTS, torch.ones(2)), NO_TOKENIZER)


class NoBatches(MeanOutput):
    def batches(self, tokenizer: Any, *, batch_size: int) -> list[ObjectiveBatch]:
        return []
