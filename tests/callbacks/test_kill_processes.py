# SPDX-License-Identifier: Apache-2.0
"""Two processes killed with SIGKILL and resumed from their last complete checkpoint end with the same bits."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import Tensor

from lightning_safety.callbacks import SafetyEnhancementTuning, SafetyPreservingAdaptation
from lightning_safety.scoring import RefusalMargin
from lightning_safety.training import CausalLanguageModule, InstructionDataModule
from tests.callbacks.processes import PROCESSES, whole_weights
from tests.spawned import begin_in_processes, run_in_processes
from tests.tiny import make_tiny_model, make_tiny_tokenizer
from tests.training.fits import last_complete, make_examples, make_trainer

CHECKPOINTS = 4


def fit(folder: Path, kind: type[Any], strategy: str, checkpoint: Path | None = None) -> dict[str, Tensor]:
    """Fit 40 steps over several epochs, as one of two processes, with dropout and a checkpoint every second step."""
    chosen: Any = strategy
    if strategy == "fsdp2":
        chosen = ModelParallelStrategy(data_parallel_size=PROCESSES, tensor_parallel_size=1)
    pl.seed_everything(1, verbose=False)
    model = make_tiny_model(attention_dropout=0.2, tie_word_embeddings=False)
    module = CausalLanguageModule(model, tokenizer=make_tiny_tokenizer(), learning_rate=1e-2)
    data = InstructionDataModule(make_examples(26), batch_size=2, seed=7)
    saver = ModelCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    callbacks = [kind(0.2, objective=RefusalMargin(limit=2)), saver]
    trainer = make_trainer(folder, callbacks, max_epochs=10, max_steps=40, devices=PROCESSES, strategy=chosen)
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    return whole_weights(module.model)


@pytest.mark.parametrize(
    ("kind", "strategy"),
    [
        (SafetyPreservingAdaptation, "ddp"),
        (SafetyEnhancementTuning, "ddp"),
        (SafetyPreservingAdaptation, "fsdp2"),
        (SafetyEnhancementTuning, "fsdp2"),
    ],
)
def test_killed_and_resumed_is_uninterrupted(tmp_path: Path, kind: type[Any], strategy: str) -> None:
    folders = {name: tmp_path / name for name in ("whole", "killed", "resumed")}
    for folder in folders.values():
        folder.mkdir()
    whole = run_in_processes(folders["whole"], partial(fit, folders["whole"] / "fit", kind, strategy))
    kept = folders["killed"] / "fit"
    started = begin_in_processes(folders["killed"], partial(fit, kept, kind, strategy))
    deadline = time.monotonic() + 120
    while len(list(kept.glob("*.ckpt"))) < CHECKPOINTS and time.monotonic() < deadline:
        time.sleep(0.002)
    for process in started.processes:
        process.kill()
    for process in started.processes:
        process.join()
        assert process.exitcode == -9, "the fit ended before it was killed"
    path = last_complete(kept)
    assert path is not None
    resumed = run_in_processes(folders["resumed"], partial(fit, kept, kind, strategy, path))
    for before, after in zip(whole, resumed, strict=True):
        assert isinstance(before, dict), before
        assert isinstance(after, dict), after
        assert all(torch.equal(after[name], weight) for name, weight in before.items())
    start = dict(make_tiny_model(attention_dropout=0.2, tie_word_embeddings=False).named_parameters())
    assert any(not torch.equal(weight, start[name]) for name, weight in resumed[0].items())
