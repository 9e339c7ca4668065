# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of `SafetyEnhancementTuning` on bases that do not train: resumed, tested, and fitted again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_safety.callbacks import SafetyEnhancementTuning
from lightning_safety.data import load_prompts
from lightning_safety.enforcement.delta_layer import delta_layers
from lightning_safety.language import find_language_model
from lightning_safety.scoring import SafetyMask
from lightning_safety.training import CausalLanguageModule, InstructionDataModule
from tests.callbacks.bases import (
    EXACT,
    BasedModule,
    evaluate,
    fit_shuffled,
    logits_of,
    make_base,
    make_dense,
    mask_of,
)
from tests.callbacks.test_resume_state import SaveAt
from tests.callbacks.toys import fit
from tests.training.fits import make_trainer

REPOSITORY = Path(__file__).parents[2]


def tune(kind: str, **options: Any) -> SafetyEnhancementTuning:
    return SafetyEnhancementTuning(mask=mask_of(make_base(kind)), **options)


@pytest.mark.parametrize("kind", EXACT)
def test_resumed_is_uninterrupted(kind: str, tmp_path: Path) -> None:
    """With dropout; from the end of an epoch this loader continues."""
    first, second = tune(kind), tune(kind)
    whole = fit_shuffled(kind, [first, SaveAt(tmp_path)])
    resumed = fit_shuffled(kind, [second], ckpt_path=tmp_path / "epoch-1.ckpt")
    assert torch.equal(logits_of(resumed), logits_of(whole))
    assert_same_patch(first, second)


def assert_same_patch(first: SafetyEnhancementTuning, second: SafetyEnhancementTuning) -> None:
    assert first.patch is not None
    assert second.patch is not None
    assert first.patch.changed > 0
    for name, after in first.patch.after.items():
        assert torch.equal(second.patch.after[name], after)
        assert torch.equal(second.patch.before[name], first.patch.before[name])


@pytest.mark.filterwarnings("ignore:.*responses of.*are cut")
@pytest.mark.parametrize("kind", ["LoRA", "nf4 under LoRA"])
def test_checkpoints_of_adapters_alone(kind: str, tmp_path: Path, tiny_tokenizer: Any) -> None:
    """In the middle of an epoch, of a mean, and in a checkpoint that holds no base."""
    sizes = {"vocab_size": 512, "max_position_embeddings": 512, "attention_dropout": 0.2}

    def run(checkpoint: Path | None) -> tuple[CausalLanguageModule, SafetyEnhancementTuning]:
        torch.manual_seed(3)
        module = CausalLanguageModule(make_base(kind, **sizes), tokenizer=tiny_tokenizer, learning_rate=1e-2)
        rows = load_prompts("harmless", split="train", limit=22)
        data = InstructionDataModule(rows, batch_size=2, seed=7, max_length=48)
        callback = SafetyEnhancementTuning(mask=mask_of(module.model), average_last=10)
        saver = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
        callbacks = [callback] if checkpoint else [callback, saver]
        trainer = make_trainer(tmp_path, callbacks, max_steps=20, enable_checkpointing=checkpoint is None)
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        return module, callback

    whole, first = run(None)
    resumed, second = run(tmp_path / "step=16.ckpt")
    assert torch.equal(logits_of(resumed), logits_of(whole))
    assert_same_patch(first, second)
    weights = torch.load(tmp_path / "step=16.ckpt", weights_only=True)["state_dict"]
    assert weights
    assert all("lora_" in name for name in weights)


def test_resumed_in_bfloat16_keeps_the_bits_that_the_base_cannot_hold(tmp_path: Path) -> None:
    options = {"precision": "bf16-true"}
    first, second = tune("LoRA"), tune("LoRA")
    fit_shuffled("LoRA", [first, SaveAt(tmp_path)], **options)
    fit_shuffled("LoRA", [second], ckpt_path=tmp_path / "epoch-1.ckpt", **options)
    one, other = (callback.state_dict()["trained"] for callback in (first, second))
    assert all(torch.equal(values, other[name]) for name, values in one.items())
    assert any(not torch.equal(values, values.bfloat16().float()) for values in one.values())


@pytest.mark.parametrize("kind", ["LoRA", "nf4"])
def test_state_is_tensors_and_primitives(kind: str, tmp_path: Path) -> None:
    callback = tune(kind)
    fit_shuffled(kind, [callback, SaveAt(tmp_path)], max_epochs=1)
    state = torch.load(tmp_path / "step-2.ckpt", weights_only=True)["callbacks"][callback.state_key]
    assert set(state) == {"version", "mask", "random", "before", "trained"}
    mask = SafetyMask.from_state_dict(state["mask"])
    for name, index in mask.indices.items():
        if index.numel():
            assert (state["trained"][name].dtype, state["trained"][name].numel()) == (torch.float32, index.numel())
            assert not torch.equal(state["trained"][name], state["before"][name])


@pytest.mark.parametrize("kind", EXACT)
def test_a_checkpoint_saved_after_the_fit_goes_on_too(kind: str, tmp_path: Path) -> None:
    whole = fit_shuffled(kind, [tune(kind)])
    callback = tune(kind)
    module = BasedModule(make_base(kind, attention_dropout=0.3))
    fit_shuffled(kind, [callback, SaveAt(tmp_path)], module=module, max_epochs=2)
    module.trainer.save_checkpoint(tmp_path / "after.ckpt")
    again = tune(kind)
    # The same model, trained by now: what the base holds must not count twice.
    resumed = fit_shuffled(kind, [again], module=module, ckpt_path=tmp_path / "after.ckpt")
    assert torch.equal(logits_of(resumed), logits_of(whole))
    assert again.patch is not None
    fresh = find_language_model(make_base(kind))
    if kind in ("frozen", "LoRA"):
        again.patch.apply(fresh)
        assert torch.equal(logits_of(BasedModule(fresh)), logits_of(whole))


@pytest.mark.parametrize("stage", ["test", "validate"])
@pytest.mark.parametrize("kind", [*EXACT, "int8 under LoRA"])
def test_a_checkpoint_is_tested_with_what_was_trained(kind: str, stage: str, tmp_path: Path) -> None:
    module = fit_shuffled(kind, [tune(kind), SaveAt(tmp_path)])
    last = evaluate(module, [], None, stage)
    fresh = BasedModule(make_base(kind))
    base = evaluate(fresh, [], None, stage)
    for epoch in (3, 0, 3):
        # Again and again in one module: each takes the place of the one before.
        found = evaluate(fresh, [tune(kind)], tmp_path / f"epoch-{epoch}.ckpt", stage)
        assert (found == pytest.approx(last, rel=1e-6)) == (epoch == 3)
        assert found != pytest.approx(base, rel=1e-4)
    assert torch.equal(logits_of(fresh), logits_of(module))
    # In the module that was fitted too, and a fit can follow.
    evaluate(module, [tune(kind)], tmp_path / "epoch-0.ckpt", stage)
    assert not torch.equal(logits_of(module), logits_of(fresh))
    fit_shuffled(kind, [tune(kind)], module=module, max_epochs=1)


def test_tested_in_a_fresh_process(tmp_path: Path) -> None:
    module = fit_shuffled("nf4 under LoRA", [tune("nf4 under LoRA"), SaveAt(tmp_path)], max_epochs=1)
    program = (
        "from pathlib import Path\n"
        "from tests.callbacks.test_sparse_delta_resume import *\n"
        "module = BasedModule(make_base('nf4 under LoRA'))\n"
        f"loss = evaluate(module, [tune('nf4 under LoRA')], Path({str(tmp_path / 'epoch-0.ckpt')!r}))\n"
        "print('loss', repr(loss))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, timeout=240, check=True
    )
    found = float(done.stdout.split("loss ")[-1])
    assert found == pytest.approx(evaluate(module, [], None), rel=1e-6)


@pytest.mark.parametrize("kind", ["LoRA", "nf4"])
def test_a_second_fit_goes_on(kind: str) -> None:
    """A frozen base holds what was trained; on a quantised one it acts, and the patch has both fits."""
    callback, module = tune(kind), BasedModule(make_base(kind))
    fit(module, [callback])
    first, halfway = callback.patch, logits_of(module)
    start: list[Tensor] = []

    class Look(pl.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            start.append(logits_of(pl_module))

    fit(module, [callback, Look()])
    second = callback.patch
    assert torch.equal(start[0], halfway)
    assert not torch.equal(logits_of(module), halfway)
    assert first is not None
    assert second is not None
    name = next(iter(first.before))
    if kind == "nf4":
        assert torch.equal(second.before[name], first.before[name])
        assert len(list(delta_layers(module))) == len(first.before)
    else:
        assert torch.equal(second.before[name], first.after[name])
    other = SafetyEnhancementTuning(mask=mask_of(make_base(kind), seed=1))
    if kind == "nf4":
        with pytest.raises(ValueError, match="expected to be that of the difference which acts on"):
            fit(module, [other])
    else:
        fit(module, [other])


def test_checkpoints_of_another_kind_of_fit(tmp_path: Path) -> None:
    mask = mask_of(make_base("frozen"))
    fit_shuffled("frozen", [SafetyEnhancementTuning(mask=mask), SaveAt(tmp_path)], max_epochs=1)
    unfrozen = BasedModule(make_dense())
    with pytest.raises(ValueError, match=r"`ckpt_path` expected .* were frozen or quantised there"):
        fit_shuffled("", [SafetyEnhancementTuning(mask=mask)], module=unfrozen, ckpt_path=tmp_path / "epoch-0.ckpt")
    fit_shuffled("", [SafetyEnhancementTuning(mask=mask), SaveAt(tmp_path)], module=unfrozen, max_epochs=1)
    with pytest.raises(ValueError, match=r"`ckpt_path` expected .* were trained in the model there"):
        fit_shuffled("frozen", [SafetyEnhancementTuning(mask=mask)], ckpt_path=tmp_path / "epoch-0.ckpt")
