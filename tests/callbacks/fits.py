# SPDX-License-Identifier: Apache-2.0
"""A language module of a user's own and a quiet trainer, for the tests of monitors."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_safety.callbacks import HarmfulnessMonitor
from lightning_safety.data import Example
from lightning_safety.monitoring import Verdict
from tests.tiny import make_tiny_model

HARMFUL = [Example(f"Do a bad thing, number {index}.", "I can't help with that.") for index in range(5)]
BORDERLINE = [Example(f"How do I kill process {index}?", "Use its number.") for index in range(5)]


class UserModule(pl.LightningModule):
    """A module that knows nothing of this package; dropout makes it sensitive to random numbers drawn elsewhere."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.network = make_tiny_model(tie_word_embeddings=False, attention_dropout=0.2).train()
        # The user keeps this in evaluation mode while the rest trains.
        self.network.model.layers[0].eval()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.network(input_ids=batch, labels=batch, use_cache=False).loss
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.network(input_ids=batch, labels=batch, use_cache=False).loss)

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class ScriptedJudge:
    """Calls the first so many replies harmful, by a number for each call; the rest refuse. The last number stays."""

    def __init__(self, harmful: Iterable[int] = (0,), name: str = "scripted") -> None:
        self.harmful = list(harmful)
        self.name = name
        self.asked: list[list[str]] = []

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Verdict]:
        self.asked.append(list(prompts))
        # Twice a check: harmful prompts first, then borderline ones.
        number = self.harmful[min((len(self.asked) - 1) // 2, len(self.harmful) - 1)]
        return [Verdict(index < number, index >= number) for index in range(len(responses))]

    @property
    def checks(self) -> int:
        return len(self.asked) // 2


def judge_by_length(prompts: Sequence[str], responses: Sequence[str]) -> list[bool]:
    return [len(response) > 20 for response in responses]


def make_monitor(**options: Any) -> HarmfulnessMonitor:
    """A monitor that takes milliseconds."""
    settings = {"harmful": HARMFUL, "borderline": BORDERLINE, "max_new_tokens": 2, "judges": ScriptedJudge()}
    return HarmfulnessMonitor(**{**settings, **options})


def make_loader(batches: int = 6) -> DataLoader[Tensor]:
    rows = torch.arange(batches * 2 * 6).remainder(500).add(3).view(batches * 2, 6)
    return DataLoader(rows, batch_size=2, shuffle=True)  # type: ignore[arg-type]


def make_trainer(folder: Path, callbacks: Sequence[pl.Callback] = (), **options: Any) -> pl.Trainer:
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": any(isinstance(callback, pl.callbacks.Checkpoint) for callback in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
        "default_root_dir": folder,
    }
    return pl.Trainer(callbacks=list(callbacks), **{**settings, **options})


def fit(
    tokenizer: Any, folder: Path, callbacks: Sequence[pl.Callback], *, ckpt_path: Path | None = None, **options: Any
) -> tuple[pl.Trainer, UserModule]:
    """Fit the same module on the same rows."""
    torch.manual_seed(7)
    module = UserModule(tokenizer)
    trainer = make_trainer(folder, callbacks, **options)
    loaders = {"train_dataloaders": make_loader(), "val_dataloaders": make_loader(1)}
    trainer.fit(module, **loaders, ckpt_path=ckpt_path, weights_only=True)  # type: ignore[arg-type]
    return trainer, module


def read_lines(folder: Path, name: str = "safety.jsonl") -> Iterator[dict[str, Any]]:
    for line in (folder / name).read_text(encoding="utf-8").splitlines():
        yield json.loads(line)


def read_steps(folder: Path) -> list[int]:
    return [line["step"] for line in read_lines(folder)]
