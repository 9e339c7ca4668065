# SPDX-License-Identifier: Apache-2.0
"""Two processes rehearse as one does, replicated (DDP) and sharded (FSDP2)."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_safety.callbacks import SafetyRehearsal
from tests.callbacks.processes import Sharded, fit_alone, fit_together
from tests.callbacks.toys import OwnModule, make_smallest_model
from tests.enforcement.objectives import Broken, Opposed
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


def test_a_bad_gradient_ends_every_process(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"safety gradient of .* is not finite"):
        fit_together(
            tmp_path,
            "ddp",
            partial(make_module, OwnModule),
            partial(rehearsals, objective=Broken(gradient_only=True)),
            steps=2,
        )
