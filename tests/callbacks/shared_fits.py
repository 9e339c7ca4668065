# SPDX-License-Identifier: Apache-2.0
"""Fits that two processes share and one makes alone, on the same rows and with monitors that take milliseconds."""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_safety.callbacks import ActivationOverlapMonitor, HarmfulnessMonitor
from lightning_safety.data import Example
from lightning_safety.monitoring import Verdict
from lightning_safety.processes import rank, world_size
from tests.callbacks import subspaces
from tests.callbacks.fits import UserModule, make_trainer
from tests.callbacks.toys import make_batches
from tests.callbacks.toys import make_loader as make_plain_loader
from tests.tiny import make_tiny_tokenizer

HARMFUL = [Example(f"Do a bad thing, number {index}.", f"I can't {'ever ' * index}help.") for index in range(5)]
BORDERLINE = [Example(f"How do I kill process {index}?", "Use its number.") for index in range(4)]
PROCESSES = 2


class ByText:
    """Says of a reply what its text says, and of some nothing."""

    name = "by_text"

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Verdict]:
        sums = [zlib.crc32(f"{pair}".encode()) for pair in zip(prompts, responses, strict=True)]
        answers = [True, False, True, False, None]
        return [Verdict(answers[number % 5], answers[number // 5 % 5]) for number in sums]


class BrokenInOne(ByText):
    """Answers with something else in the second process."""

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Verdict]:
        return super().score(prompts, responses) if rank() == 0 else ["yes"]  # type: ignore[list-item]


def harmfulness(**options: Any) -> HarmfulnessMonitor:
    settings = {"every_n_steps": 2, "harmful": HARMFUL, "borderline": BORDERLINE, "max_new_tokens": 3}
    return HarmfulnessMonitor(**{**settings, "judges": [ByText(), "keyword_refusal"], **options})


def activations(**options: Any) -> ActivationOverlapMonitor:
    settings = {"every_n_steps": 2, "harmful": HARMFUL, "harmless": BORDERLINE, "layers": [1, 2], "figures": False}
    return ActivationOverlapMonitor(**{**settings, **options})


def monitors() -> list[pl.Callback]:
    return [harmfulness(), activations(), subspaces.make_monitor()]


def fit(
    folder: Path, callbacks: Sequence[pl.Callback], *, steps: int = 4, dropout: float = 0.0, **options: Any
) -> tuple[pl.Trainer, dict[str, Tensor]]:
    """Fit alone, or as one of two processes; the rows of a step are the same. Return the trainer and the weights."""
    torch.manual_seed(7)
    module = UserModule(make_tiny_tokenizer())
    for layer in module.network.model.layers:
        layer.self_attn.attention_dropout = dropout
    rows = make_batches(steps * PROCESSES, vocabulary=512)
    alone = world_size() == 1
    batches = [torch.cat(rows[at : at + PROCESSES]) for at in range(0, len(rows), PROCESSES)]
    settings = {"max_epochs": 1, "devices": 1, "strategy": "auto"}
    if not alone:
        batches = rows[rank() :: PROCESSES]
        settings |= {"devices": PROCESSES, "strategy": "ddp"}
    ckpt_path = options.pop("ckpt_path", None)
    trainer = make_trainer(folder, callbacks, **{**settings, "use_distributed_sampler": False, **options})
    trainer.fit(module, make_plain_loader(batches), ckpt_path=ckpt_path, weights_only=True)
    assert trainer.world_size == world_size()
    return trainer, {name: weight.detach().clone() for name, weight in module.named_parameters()}


def validate(folder: Path, callbacks: Sequence[pl.Callback]) -> pl.Trainer:
    """Validate an untrained model, alone or as one of two processes."""
    torch.manual_seed(7)
    settings = {"devices": world_size(), "strategy": "auto" if world_size() == 1 else "ddp", "limit_val_batches": 1}
    trainer = make_trainer(folder, callbacks, use_distributed_sampler=False, **settings)
    trainer.validate(UserModule(make_tiny_tokenizer()), make_plain_loader(make_batches(1)), verbose=False)
    return trainer


def metrics_of(trainer: pl.Trainer) -> dict[str, float]:
    found = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return {name: value for name, value in found.items() if name.startswith("safety/")}


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


class PoisonInOne(pl.Callback):
    """Makes the weights of the second process NaN before the first step."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if os.environ.get("RANK") == "1":
            with torch.no_grad():
                next(pl_module.parameters()).fill_(float("nan"))
