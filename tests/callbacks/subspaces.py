# SPDX-License-Identifier: Apache-2.0
"""A subspace monitor that takes milliseconds, and the weights of a fit step by step."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from torch import Tensor

from lightning_safety.callbacks import SubspaceOverlapMonitor
from lightning_safety.data import Example
from lightning_safety.scoring import RefusalLikelihood, RefusalMargin, scored_weights

HARMFUL = [Example("Do a bad thing.", "I can't help with that."), Example("Do another.", "Sorry, I will not.")]
EVERYDAY = [Example("What is water?", "A clear liquid."), Example("Name a bird.", "The robin is one.")]


def make_monitor(**options: Any) -> SubspaceOverlapMonitor:
    settings = {
        "every_n_steps": 2,
        "reference": RefusalMargin(HARMFUL),
        "utility": RefusalLikelihood(EVERYDAY),
        "energy": 0.8,
        "figures": False,
    }
    return SubspaceOverlapMonitor(**{**settings, **options})


class Weights(pl.Callback):
    """The weights at fit start and after every step."""

    def __init__(self) -> None:
        self.seen: dict[int, dict[str, Tensor]] = {}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._look(trainer, pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        self._look(trainer, pl_module)

    def _look(self, trainer: pl.Trainer, pl_module: Any) -> None:
        scored = scored_weights(pl_module.network)
        self.seen[trainer.global_step] = {name: weight.detach().clone() for name, weight in scored.items()}
