# SPDX-License-Identifier: Apache-2.0
"""Resumed is uninterrupted: the same bits after SIGKILL with dropout on, and what happens where that cannot be."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint

from lightning_safety.callbacks import SafetyEnhancementTuning, SafetyPreservingAdaptation, SafetyRehearsal
from lightning_safety.data import load_prompts
from lightning_safety.monitoring import own_replies
from lightning_safety.scoring import RefusalLikelihood, RefusalMargin, SafetyMask
from lightning_safety.training import CausalLanguageModule, InstructionDataModule
from tests.callbacks.fits import fit as fit_user_module
from tests.tiny import make_tiny_model, make_tiny_tokenizer
from tests.training.fits import make_trainer
from tests.training.test_kill import last_complete

REPOSITORY = Path(__file__).parents[2]
STEPS = 40
CALLBACKS = {
    "spa": SafetyPreservingAdaptation,
    "rescored spa": partial(SafetyPreservingAdaptation, rescore_every_n_steps=5),
    "set": SafetyEnhancementTuning,
    "averaged set": partial(SafetyEnhancementTuning, average_last=STEPS - 2),
}
REHEARSALS = {
    "rehearsal": partial(SafetyRehearsal, 3),
    "adaptive rehearsal": partial(SafetyRehearsal, "adaptive", watch_every_n_steps=6, tolerance=0.0, watch_prompts=4),
}


def make_mask() -> SafetyMask:
    """Every seventh weight of two matrices."""
    shapes = {
        name: tuple(weight.shape)
        for name, weight in make_tiny_model().named_parameters()
        if name.endswith("layers.0.mlp.up_proj.weight") or name.endswith("layers.1.self_attn.v_proj.weight")
    }
    return SafetyMask({name: torch.arange(0, rows * columns, 7) for name, (rows, columns) in shapes.items()}, shapes)


def fit(
    folder: Path,
    kind: str,
    given: bool,
    checkpoint: Path | None = None,
    callbacks: tuple[pl.Callback, ...] | None = None,
) -> tuple[CausalLanguageModule, pl.Trainer]:
    """Fit with dropout and a checkpoint every second step, in the middle of epochs too."""
    torch.manual_seed(3)
    module = CausalLanguageModule(
        make_tiny_model(attention_dropout=0.2), tokenizer=make_tiny_tokenizer(), learning_rate=1e-2, schedule="linear"
    )
    data = InstructionDataModule(load_prompts("harmless", split="train", limit=22), batch_size=2, seed=7, max_length=48)
    if callbacks is None and kind in REHEARSALS:
        callbacks = (REHEARSALS[kind](objective=RefusalLikelihood(limit=4), batch_size=1),)
    elif callbacks is None:
        objective = RefusalMargin(limit=4)
        callbacks = (CALLBACKS[kind](0.05, mask=make_mask() if given else None, objective=objective),)
    saver = ModelCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    trainer = make_trainer(folder, [saver, *callbacks], max_epochs=10, max_steps=STEPS)
    # A random model refuses nothing.
    with patch.object(own_replies, "generate_replies", lambda *given, **_: ["I can't help with that."] * len(given[2])):
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    return module, trainer


@pytest.mark.filterwarnings("ignore:.*responses of.*are cut")
@pytest.mark.parametrize(
    ("kind", "given"),
    [
        pytest.param("spa", False, id="spa, mask computed"),
        pytest.param("spa", True, id="spa, mask given"),
        pytest.param("rescored spa", False, id="spa, mask computed again and again"),
        pytest.param("set", False, id="set, mask computed"),
        pytest.param("set", True, id="set, mask given"),
        pytest.param("averaged set", True, id="averaged set"),
        *(pytest.param(kind, False, id=kind) for kind in REHEARSALS),
    ],
)
def test_killed_and_resumed_is_uninterrupted(tmp_path, kind, given):
    whole, first = fit(tmp_path / "whole", kind, given)
    if kind in REHEARSALS:
        assert 0 < first.callback_metrics["safety/rehearsal_share"] < 1
    folder = tmp_path / "killed"
    call = f"fit(Path({str(folder)!r}), {kind!r}, {given})"
    program = f"from pathlib import Path; from tests.callbacks.test_resume import fit; {call}"
    process = subprocess.Popen([sys.executable, "-c", program], cwd=REPOSITORY, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while len(list(folder.glob("*.ckpt"))) < 7 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the fit ended before it was killed"
    path = last_complete(folder)
    assert path is not None
    resumed, trainer = fit(folder, kind, given, path)
    assert trainer.global_step == STEPS
    expected = whole.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.model.state_dict().items())


@pytest.mark.filterwarnings("ignore:.*responses of.*are cut")
def test_resumed_without_our_state(tmp_path):
    fit(tmp_path, "spa", True, callbacks=())
    path = last_complete(tmp_path)
    assert path is not None
    with pytest.raises(ValueError, match="`mask` expected to be given: the checkpoint has no state"):
        fit(tmp_path / "computed", "spa", False, path)
    weights = torch.load(path, weights_only=True)["state_dict"]
    mask = make_mask()
    path = sorted(tmp_path.glob("step=20*.ckpt"))[0]
    weights = torch.load(path, weights_only=True)["state_dict"]
    with pytest.warns(UserWarning, match="from their values in the checkpoint on"):
        module, _ = fit(tmp_path / "given", "spa", True, path)
    after = module.state_dict()
    for name, indices in mask.indices.items():
        before, now = weights[f"model.{name}"].flatten(), after[f"model.{name}"].flatten()
        assert torch.equal(now[indices.long()], before[indices.long()])
        assert not torch.equal(now, before)


def test_a_loader_that_cannot_resume_is_named_and_held_weights_stay_held(tmp_path, tiny_tokenizer):
    mask = make_mask()
    saver = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    _, module = fit_user_module(
        tiny_tokenizer, tmp_path, [saver, SafetyPreservingAdaptation(mask=mask)], max_epochs=1, max_steps=6
    )
    held = {name: module.network.get_parameter(name).flatten()[i.long()].clone() for name, i in mask.indices.items()}
    again = SafetyPreservingAdaptation(mask=mask)
    with pytest.warns(UserWarning, match="DataLoader over Tensor cannot continue in the middle of an epoch"):
        _, resumed = fit_user_module(
            tiny_tokenizer, tmp_path, [again], max_epochs=2, ckpt_path=tmp_path / "step=4.ckpt"
        )
    for name, indices in mask.indices.items():
        assert torch.equal(resumed.network.get_parameter(name).flatten()[indices.long()], held[name])
