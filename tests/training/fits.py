# SPDX-License-Identifier: Apache-2.0
"""Fits that the tests of this room share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_safety.data import Example
from lightning_safety.training.counters import correct_at_fit_start


def make_examples(number: int, word: str = "word") -> list[Example]:
    """Rows of different lengths and contents."""
    return [
        Example(f"Say {word} {row} " + "and " * (row * 7 % 11), f"{word} {row} " + "yes " * (row * 5 % 13))
        for row in range(number)
    ]


def make_trainer(folder: Path, callbacks: Sequence[pl.Callback] = (), **options: Any) -> pl.Trainer:
    """A quiet trainer on the CPU."""
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": any(isinstance(callback, pl.callbacks.Checkpoint) for callback in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": folder,
    }
    return pl.Trainer(callbacks=list(callbacks), **{**settings, **options})


def last_complete(folder: Path) -> Path | None:
    """Lightning writes a checkpoint into its file in one go but not atomically: the newest may be half of one.

    Of a sharded one, a folder, it writes ``meta.pt`` when all else is there.
    """
    for path in sorted(folder.glob("*.ckpt"), key=lambda path: -int(path.stem.partition("=")[2].partition("-")[0])):
        try:
            torch.load(path / "meta.pt" if path.is_dir() else path, weights_only=True)
        except Exception:
            continue
        return path
    return None


class TraceModule(pl.LightningModule):
    """Has one weight and a memory: which batch it saw at which place."""

    def __init__(self, *, tokenizer: Any = None, counts_steps: bool = False) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.counts_steps = counts_steps
        self.seen: list[tuple[int, int, int]] = []

    def on_train_start(self) -> None:
        # What CausalLanguageModule does.
        correct_at_fit_start(self.trainer)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        content = hash(tuple(batch["input_ids"].flatten().tolist()))
        self.seen.append((self.trainer.current_epoch, batch_idx, content))
        return self.weight * batch["labels"].clamp(min=0).float().mean() / 100

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        assert batch["labels"].shape == batch["input_ids"].shape

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.counts_steps:
            # Sets up the loader early: Lightning then never loads the loader's state from a checkpoint.
            assert self.trainer.estimated_stepping_batches > 0
        return torch.optim.AdamW(self.parameters(), lr=0.1)


class SaveEverywhere(pl.Callback):
    """Saves a checkpoint wherever Lightning can, and remembers how many batches were seen until then."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.saved: dict[Path, int] = {}

    def _save(self, trainer: pl.Trainer, module: Any, moment: str) -> None:
        path = self.folder / f"{len(self.saved)}-{moment}.ckpt"
        trainer.save_checkpoint(path)
        self.saved[path] = len(module.seen)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        # Between two batches of one optimizer step the gradients so far would be lost.
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or batch_idx + 1 == trainer.num_training_batches:
            self._save(trainer, pl_module, "batch")

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._save(trainer, pl_module, "epoch")

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if (trainer.fit_loop.batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self._save(trainer, pl_module, "validation")
