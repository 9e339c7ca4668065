# SPDX-License-Identifier: Apache-2.0
"""What scoring takes is said before it starts, and stops a fit for which it is not there."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_safety.callbacks.selected import SelectedWeightsCallback
from lightning_safety.scoring import ObjectiveBatch, RefusalMargin, SafetyObjective, memory
from tests.callbacks.toys import BOTH, OwnModule, fit, make_smallest_model, no_scoring
from tests.tiny import make_tiny_tokenizer


def make_module() -> OwnModule:
    model = make_smallest_model(vocab_size=512, max_position_embeddings=256)
    return OwnModule(model, tokenizer=make_tiny_tokenizer())


@BOTH
def test_it_is_said_before(kind: type[SelectedWeightsCallback], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        fit(make_module(), [kind(0.1, objective=RefusalMargin(limit=2))])
    said = [record.message for record in caplog.records]
    (estimate,) = (
        place for place, text in enumerate(said) if text.startswith("Scoring takes about 0.00 GB on cpu: sum")
    )
    (chosen,) = (place for place, text in enumerate(said) if text.startswith(f"{kind.__name__}: "))
    assert estimate < chosen


@BOTH
def test_too_little_memory_stops_the_fit_before_it_scores(
    kind: type[SelectedWeightsCallback], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda _: 100)
    with no_scoring(monkeypatch), pytest.raises(MemoryError, match=r"expected to leave .* free on cpu"):
        fit(make_module(), [kind(0.1, objective=RefusalMargin(limit=2))])


class OfNoTokens(SafetyObjective):
    def batches(self, tokenizer: Any, *, batch_size: int) -> list[ObjectiveBatch]:
        return [ObjectiveBatch({"rows": torch.tensor([[1, 2, 3]])}, 1)]

    def loss(self, model: nn.Module, batch: ObjectiveBatch) -> Tensor:
        loss: Tensor = model(input_ids=batch.tensors["rows"], labels=batch.tensors["rows"]).loss
        return loss


@BOTH
def test_an_objective_that_does_not_say_what_it_runs_is_scored(
    kind: type[SelectedWeightsCallback], caplog: pytest.LogCaptureFixture
) -> None:
    callback = kind(0.1, objective=OfNoTokens())
    with caplog.at_level(logging.INFO):
        fit(make_module(), [callback])
    assert "What scoring takes is not estimated: `objective` expected to have `input_ids`" in caplog.text
    assert callback.mask is not None
