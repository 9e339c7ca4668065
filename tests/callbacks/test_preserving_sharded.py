# SPDX-License-Identifier: Apache-2.0
"""Two processes that share a model (FSDP2) hold its weights as one process does."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn

from lightning_safety.callbacks import SafetyPreservingAdaptation, SafetyRehearsal
from lightning_safety.scoring import ObjectiveBatch, RefusalMargin, SafetyMask
from tests.callbacks.processes import Sharded, fit_alone, fit_together, sgd
from tests.callbacks.processes import make_uneven_model as make_model
from tests.callbacks.toys import OwnModule, adamw, assert_acted, mask_of_everything, weights_of
from tests.enforcement.objectives import Opposed
from tests.tiny import make_tiny_tokenizer

STEPS = 6


def make_module(kind: type[OwnModule], optimizers: Any = sgd) -> OwnModule:
    return kind(make_model(), optimizers)


def given() -> list[Any]:
    return [SafetyPreservingAdaptation(mask=mask_of_everything(make_model()))]


def assert_held_together(together: dict[str, torch.Tensor], mask: SafetyMask) -> None:
    model = make_model()
    before = weights_of(model)
    model.load_state_dict(together, strict=False)
    assert_acted(SafetyPreservingAdaptation, model, before, mask)


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """The norm that clips is that of all free weights in all processes."""
    options = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1, "steps": STEPS}
    together = fit_together(tmp_path, "fsdp2", partial(make_module, Sharded), given, **options)
    for name, weight in fit_alone(make_module(OwnModule), given(), **options).items():
        torch.testing.assert_close(together[name], weight, rtol=1e-5, atol=1e-6)
    assert_held_together(together, mask_of_everything(make_model()))


def make_resumable() -> OwnModule:
    """Each process draws its own random numbers, as data and dropout may."""
    torch.manual_seed(int(os.environ.get("RANK", "0")))
    return Sharded(make_model(attention_dropout=0.2), adamw, tokenizer=make_tiny_tokenizer())


def make_unscorable() -> OwnModule:
    """Without a tokenizer there is nothing to score by."""
    return Sharded(make_model(attention_dropout=0.2), adamw)


def scored(folder: Path, saved: bool) -> list[Any]:
    spa = SafetyPreservingAdaptation(
        0.05, objective=RefusalMargin(limit=3), batch_size=1, save_mask=folder / f"{os.getpid()}.mask"
    )
    rehearsal = SafetyRehearsal(2, objective=Opposed(), tokenizer=make_tiny_tokenizer(), batch_size=1)
    saver = ModelCheckpoint(dirpath=folder, filename="{epoch}", save_top_k=-1)
    return [spa, rehearsal, saver] if saved else [spa, rehearsal]


def test_scored_together_and_resumed_as_if_uninterrupted(tmp_path: Path) -> None:
    options = {"steps": 3, "max_epochs": 2, "num_sanity_val_steps": 1}
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    whole.mkdir()
    resumed.mkdir()
    uninterrupted = fit_together(whole, "fsdp2", make_resumable, partial(scored, whole, True), **options)
    checkpoint = whole / "epoch=0.ckpt"
    again = fit_together(
        resumed, "fsdp2", make_resumable, partial(scored, resumed, False), ckpt_path=checkpoint, **options
    )
    for name, weight in uninterrupted.items():
        assert torch.equal(weight, again[name]), name
    # Only one process writes.
    (found,), (kept,) = whole.glob("*.mask"), resumed.glob("*.mask")
    mask = SafetyMask.load(found)
    assert SafetyMask.load(kept) == mask
    alone = SafetyPreservingAdaptation(0.05, objective=RefusalMargin(limit=3))
    fit_alone(OwnModule(make_model(), adamw, tokenizer=make_tiny_tokenizer()), [alone], steps=1)
    assert alone.mask is not None
    assert mask.overlap(alone.mask) / (mask | alone.mask).count >= 0.99
    assert_held_together(uninterrupted, mask)
    # One process takes up what two have saved; it scores nothing.
    single = tmp_path / "single"
    single.mkdir()
    options |= {"ckpt_path": checkpoint, "processes": 1}
    held = fit_together(single, "fsdp2", make_unscorable, partial(scored, single, False), **options)
    assert SafetyMask.load(next(single.glob("*.mask"))) == mask
    assert_held_together(held, mask)


class FailsInOne(RefusalMargin):
    """Its loss cannot be computed in the second process."""

    def loss(self, model: nn.Module, batch: ObjectiveBatch) -> torch.Tensor:
        if os.environ.get("RANK") == "1":
            raise RuntimeError("no loss in this process")
        return super().loss(model, batch)


def failing() -> list[Any]:
    return [SafetyPreservingAdaptation(0.05, objective=FailsInOne(limit=3))]


def test_an_error_while_scoring_in_one_process_ends_both_and_is_shown(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)process 0: .*process 1: .*no loss in this process"):
        fit_together(tmp_path, "fsdp2", make_resumable, failing, steps=1)
