# SPDX-License-Identifier: Apache-2.0
"""A fit killed with SIGKILL and resumed from its last complete checkpoint ends with the same bits."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint

from lightning_safety.training import CausalLanguageModule, InstructionDataModule
from tests.tiny import make_tiny_model, make_tiny_tokenizer
from tests.training.fits import last_complete, make_examples, make_trainer

REPOSITORY = Path(__file__).parents[2]


def fit(folder: Path, checkpoint: Path | None = None) -> CausalLanguageModule:
    """Fit 60 steps over several epochs, with a checkpoint every second step."""
    tokenizer = make_tiny_tokenizer()
    module = CausalLanguageModule(make_tiny_model(), tokenizer=tokenizer, learning_rate=1e-2, schedule="linear")
    data = InstructionDataModule(make_examples(26), make_examples(3), batch_size=2, seed=7)
    saver = ModelCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    trainer = make_trainer(folder, [saver], max_epochs=10, max_steps=60)
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    return module


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The weights at the end of the fit that nobody interrupts."""
    return fit(tmp_path_factory.mktemp("whole")).state_dict()


@pytest.mark.parametrize("checkpoints", [2, 15])
def test_killed_and_resumed_is_uninterrupted(tmp_path: Path, whole: dict[str, torch.Tensor], checkpoints: int) -> None:
    folder = tmp_path / "killed"
    program = f"from pathlib import Path; from tests.training.test_kill import fit; fit(Path({str(folder)!r}))"
    process = subprocess.Popen([sys.executable, "-c", program], cwd=REPOSITORY, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list(folder.glob("*.ckpt"))) < checkpoints and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the fit ended before it was killed"
    path = last_complete(folder)
    assert path is not None
    resumed = fit(folder, path).state_dict()
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
