# SPDX-License-Identifier: Apache-2.0
"""Two processes rehearse as one does, replicated (DDP) and sharded (FSDP2)."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lightning_safety.callbacks import SafetyRehearsal
from lightning_safety.data import Example
from lightning_safety.scoring import ObjectiveBatch, RefusalLikelihood
from tests.callbacks.processes import Sharded, fit_alone, fit_together
from tests.callbacks.toys import OwnModule, make_smallest_model
from tests.enforcement.objectives import Opposed, TokenRows
from tests.tiny import make_tiny_tokenizer

STEPS = 6
KINDS: dict[str, type[OwnModule]] = {"ddp": OwnModule, "fsdp2": Sharded}


def sgd(weights: list[nn.Parameter]) -> list[torch.optim.Optimizer]:
    return [torch.optim.SGD(weights, lr=0.05, momentum=0.9)]


def make_module(kind: type[OwnModule]) -> OwnModule:
    return kind(make_smallest_model(), sgd)


def rehearsals(**options: Any) -> list[SafetyRehearsal]:
    settings = {"every": 2, "objective": Opposed(), "tokenizer": make_tiny_tokenizer(), "batch_size": 1, **options}
    return [SafetyRehearsal(**settings)]


@pytest.mark.parametrize("strategy", KINDS)
@pytest.mark.parametrize("mode", ["add", "project"])
def test_two_processes_rehearse_as_one(tmp_path: Path, strategy: str, mode: str) -> None:
    options = {"steps": STEPS, "accumulate_grad_batches": 2}
    together = fit_together(
        tmp_path, strategy, partial(make_module, KINDS[strategy]), partial(rehearsals, mode=mode), **options
    )
    alone = fit_alone(OwnModule(make_smallest_model(), sgd), rehearsals(mode=mode), **options)
    plain = fit_alone(OwnModule(make_smallest_model(), sgd), [], **options)
    for name, weight in alone.items():
        torch.testing.assert_close(together[name], weight, rtol=1e-5, atol=1e-6)
    assert max(float((plain[name] - weight).abs().max()) for name, weight in alone.items()) > 1e-3


def make_wide_module(kind: type[OwnModule]) -> OwnModule:
    return kind(make_smallest_model(vocab_size=512, max_position_embeddings=256), sgd)


@pytest.mark.parametrize("strategy", KINDS)
def test_rows_that_begin_alike_are_rehearsed_as_in_one(tmp_path: Path, strategy: str) -> None:
    """What they have in common is computed once where that is possible, by the body of the model alone."""
    rows = [Example(f"Please tell me in a few short sentences, without delay, about {what}.", "No.") for what in "ab"]
    options: dict[str, Any] = {"objective": RefusalLikelihood(rows), "batch_size": 2, "weight": 5.0}
    together = fit_together(
        tmp_path, strategy, partial(make_wide_module, KINDS[strategy]), partial(rehearsals, **options), steps=3
    )
    alone = fit_alone(make_wide_module(OwnModule), rehearsals(**options), steps=3)
    plain = fit_alone(make_wide_module(OwnModule), [], steps=3)
    for name, weight in alone.items():
        torch.testing.assert_close(together[name], weight, rtol=1e-5, atol=1e-6)
    assert max(float((plain[name] - weight).abs().max()) for name, weight in alone.items()) > 1e-3


class DifferentInEach(TokenRows):
    """What it keeps when it is prepared depends on the process, as replies may by a rounding."""

    factor = 0

    def prepare(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
        self.factor = 1 + int(os.environ.get("RANK", "0"))

    def state_dict(self) -> dict[str, Any]:
        return {"factor": self.factor}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.factor = state_dict["factor"]

    def loss(self, model: nn.Module, batch: ObjectiveBatch) -> Tensor:
        return super().loss(model, batch) * self.factor


def test_all_processes_rehearse_what_the_first_has_heard(tmp_path: Path) -> None:
    options = {"objective": DifferentInEach(), "weight": 5.0}
    together = fit_together(tmp_path, "ddp", partial(make_module, OwnModule), partial(rehearsals, **options), steps=3)
    alone = fit_alone(make_module(OwnModule), rehearsals(**options), steps=3)
    for name, weight in alone.items():
        torch.testing.assert_close(together[name], weight, rtol=1e-5, atol=1e-6)


class BrokenInOne(TokenRows):
    """Its loss is not finite in the second process."""

    def loss(self, model: nn.Module, batch: ObjectiveBatch) -> Tensor:
        return super().loss(model, batch) * (float("nan") if os.environ["RANK"] == "1" else 1.0)


def test_a_bad_loss_in_one_process_ends_every_process(tmp_path: Path) -> None:
    told = r"The safety loss of BrokenInOne expected to be finite"
    with pytest.raises(RuntimeError, match=rf"(?s)process 0: .*{told}.*process 1: .*{told}"):
        fit_together(
            tmp_path,
            "ddp",
            partial(make_module, OwnModule),
            partial(rehearsals, objective=BrokenInOne()),
            steps=2,
        )
