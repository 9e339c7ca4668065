# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint holds for SPA and SET, and what becomes of it; kills are in test_resume.py."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from lightning_safety.callbacks import SafetyEnhancementTuning, SafetyPreservingAdaptation
from lightning_safety.callbacks.selected import SelectedWeightsCallback
from lightning_safety.scoring import RefusalMargin, SafetyMask
from tests.callbacks.toys import (
    OwnModule,
    assert_held,
    assert_only_selected_moved,
    assert_same_bits,
    fit,
    make_batches,
    make_smallest_model,
    mask_of_everything,
    no_scoring,
    quiet,
    weights_of,
)
from tests.tiny import make_tiny_model

BOTH = pytest.mark.parametrize("kind", [SafetyPreservingAdaptation, SafetyEnhancementTuning])


class SaveAt(pl.Callback):
    """Saves after every epoch, and after every batch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        trainer.save_checkpoint(self.folder / f"step-{trainer.global_step}.ckpt")

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        trainer.save_checkpoint(self.folder / f"epoch-{trainer.current_epoch}.ckpt")


class Drawing(OwnModule):
    """Draws from Python's and NumPy's generators too."""

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        return super().training_step(*args, **kwargs) * (1 + random.random() + np.random.rand())


def fit_shuffled(
    callbacks: list[Any], *, ckpt_path: Path | None = None, workers: bool = False, **options: Any
) -> OwnModule:
    """Dropout, and torch's own shuffled loader: both draw from the global generator."""
    pl.seed_everything(5 if ckpt_path is None else 99, verbose=False)
    module = Drawing(make_smallest_model(attention_dropout=0.3))
    trainer = pl.Trainer(**quiet(callbacks, **{"max_epochs": 4, **options}))
    trainer.fit(module, DataLoader(torch.cat(make_batches(12)), batch_size=3, shuffle=True), ckpt_path=ckpt_path)
    return module


@BOTH
@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_plain_shuffled_loader_resumes_exactly_from_an_epochs_end(
    kind: type[SelectedWeightsCallback], epoch: int, tmp_path: Path
) -> None:
    """Dropout and the loader's order continue, although this loader knows nothing of resuming."""
    mask = mask_of_everything(make_smallest_model())
    whole = fit_shuffled([kind(mask=mask), SaveAt(tmp_path)])
    resumed = fit_shuffled([kind(mask=mask)], ckpt_path=tmp_path / f"epoch-{epoch}.ckpt")
    assert_same_bits(resumed.model, whole.model)


@BOTH
def test_dropout_and_order_matter_in_these_tests(kind: type[SelectedWeightsCallback], tmp_path: Path) -> None:
    mask = mask_of_everything(make_smallest_model())
    whole = fit_shuffled([kind(mask=mask), SaveAt(tmp_path)])

    class WithoutRandomness(kind):  # type: ignore[misc, valid-type]
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            super().on_fit_start(trainer, pl_module)
            torch.manual_seed(99)
            self._randomness.at_fit_start(None)

        @property
        def state_key(self) -> str:
            return super().state_key.replace("WithoutRandomness", kind.__name__)

    other = fit_shuffled([WithoutRandomness(mask=mask)], ckpt_path=tmp_path / "epoch-1.ckpt")
    with pytest.raises(AssertionError):
        assert_same_bits(other.model, whole.model)


@BOTH
def test_resumed_fit_scores_nothing_and_keeps_its_mask(
    kind: type[SelectedWeightsCallback], tmp_path: Path, monkeypatch: Any, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    def make() -> tuple[OwnModule, SelectedWeightsCallback]:
        module = OwnModule(make_tiny_model().train(), tokenizer=tiny_tokenizer)
        return module, kind(fraction=0.05, objective=RefusalMargin(limit=2))

    whole, first = make()
    fit(whole, [first, SaveAt(tmp_path)], steps=6)
    for saved in ("epoch-0", "step-2"):
        module, second = make()
        with no_scoring(monkeypatch):
            fit(module, [second], steps=6, ckpt_path=tmp_path / f"{saved}.ckpt", max_epochs=2)
        assert second.mask == first.mask
        assert first.mask is not None
        if kind is SafetyEnhancementTuning:
            assert_only_selected_moved(module.model, weights_of(make_tiny_model()), first.mask)
        else:
            assert_held(module.model, weights_of(make_tiny_model()), first.mask)


def test_patch_of_a_resumed_fit_starts_before_the_first(tmp_path: Path) -> None:
    mask = mask_of_everything(make_smallest_model())
    fit_shuffled([SafetyEnhancementTuning(mask=mask), SaveAt(tmp_path)])
    callback = SafetyEnhancementTuning(mask=mask)
    resumed = fit_shuffled([callback], ckpt_path=tmp_path / "epoch-1.ckpt")
    subject = make_smallest_model()
    assert callback.patch is not None
    callback.patch.apply(subject)
    assert_same_bits(subject, resumed.model)


@BOTH
def test_state_is_tensors_and_primitives(kind: type[SelectedWeightsCallback], tmp_path: Path) -> None:
    mask = mask_of_everything(make_smallest_model())
    callback = kind(mask=mask)
    trainer = fit(OwnModule(make_smallest_model()), [callback])
    trainer.save_checkpoint(tmp_path / "fit.ckpt")
    saved = torch.load(tmp_path / "fit.ckpt", weights_only=True)["callbacks"]
    assert list(saved) == [callback.state_key]
    state = saved[callback.state_key]
    assert SafetyMask.from_state_dict(state["mask"]) == mask
    assert set(state) == {"version", "mask", "random", "before" if kind.trains else "chosen_at"}


@BOTH
def test_newer_state_is_refused(kind: type[SelectedWeightsCallback]) -> None:
    with pytest.raises(ValueError, match=rf"State of {kind.__name__} expected to be version 1 but got 2"):
        kind().load_state_dict({"version": 2})


@BOTH
def test_other_mask_than_the_resumed_fit(kind: type[SelectedWeightsCallback], tmp_path: Path) -> None:
    model = make_smallest_model()
    for name, fraction in (("first", 0.2), ("second", 0.3)):
        (tmp_path / name).mkdir()
        mask_of_everything(model, fraction).save(tmp_path / name / "mask.safetensors")
    fit_shuffled([kind(mask=tmp_path / "first" / "mask.safetensors"), SaveAt(tmp_path)], max_epochs=1)
    with pytest.raises(ValueError, match=r"`mask` expected to be the one of the resumed fit but it selects other"):
        fit_shuffled([kind(mask=tmp_path / "second" / "mask.safetensors")], ckpt_path=tmp_path / "epoch-0.ckpt")


@BOTH
def test_state_of_other_arguments_is_named(kind: type[SelectedWeightsCallback], tmp_path: Path) -> None:
    fit_shuffled([kind(fraction=0.03, method="random"), SaveAt(tmp_path)], max_epochs=1)
    with (
        pytest.raises(
            ValueError, match=rf"no state of {kind.__name__}.*0\.05.*It has {kind.__name__}.*0\.03"
        ) as caught,
        pytest.warns(UserWarning, match="callbacks used to create the checkpoint"),
    ):
        fit_shuffled([kind(fraction=0.05, method="random")], ckpt_path=tmp_path / "epoch-0.ckpt")
    assert "Pass `mask=`" in str(caught.value)


def test_state_keys_tell_callbacks_apart(tmp_path: Path) -> None:
    mask = mask_of_everything(make_smallest_model())
    keys = {
        callback.state_key
        for kind in (SafetyPreservingAdaptation, SafetyEnhancementTuning)
        for callback in (
            kind(),
            kind(fraction=0.02),
            kind(method="random"),
            kind(method="random", seed=1),
            kind(mask=mask),
            kind(mask=mask - mask_of_everything(make_smallest_model(), 0.1)),
            kind(mask=tmp_path / "a.safetensors"),
            kind(mask=tmp_path / "b.safetensors"),
        )
    }
    assert len(keys) == 16
    assert SafetyPreservingAdaptation(mask=mask).state_key == SafetyPreservingAdaptation(mask=mask).state_key


def test_state_key_reads_a_given_mask_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning asks for the key at every hook of every batch."""
    callback = SafetyPreservingAdaptation(mask=mask_of_everything(make_smallest_model()))
    key = callback.state_key
    monkeypatch.setattr("hashlib.sha256", None)
    assert callback.state_key == key


def test_checkpoint_of_a_dense_fit_is_refused_for_training_a_selection(tmp_path: Path) -> None:
    fit_shuffled([SaveAt(tmp_path)], max_epochs=1)
    mask = mask_of_everything(make_smallest_model())
    with pytest.raises(ValueError, match=r"its optimizer trained whole tensors\. .*load_from_checkpoint"):
        fit_shuffled([SafetyEnhancementTuning(mask=mask)], ckpt_path=tmp_path / "epoch-0.ckpt")


@BOTH
def test_loader_that_starts_over_is_named(
    kind: type[SelectedWeightsCallback], tmp_path: Path, monkeypatch: Any
) -> None:
    mask = mask_of_everything(make_smallest_model())
    fit_shuffled([kind(mask=mask), SaveAt(tmp_path)], max_epochs=1)
    with (
        no_scoring(monkeypatch),
        pytest.warns(UserWarning, match="DataLoader over Tensor cannot continue in the middle"),
    ):
        resumed = fit_shuffled([kind(mask=mask)], ckpt_path=tmp_path / "step-2.ckpt", max_epochs=2)
    if kind is SafetyPreservingAdaptation:
        assert_held(resumed.model, weights_of(make_smallest_model()), mask)
    else:
        assert_only_selected_moved(resumed.model, weights_of(make_smallest_model()), mask)


def test_states_are_left_alone_by_test_and_validate(tmp_path: Path) -> None:
    mask = mask_of_everything(make_smallest_model())
    fit_shuffled([SafetyPreservingAdaptation(mask=mask), SaveAt(tmp_path)], max_epochs=1)

    class Tested(OwnModule):
        def test_step(self, batch: Tensor, batch_idx: int) -> None:
            assert all(not weight._post_accumulate_grad_hooks for weight in self.parameters())

    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    trainer = pl.Trainer(**quiet([SafetyPreservingAdaptation(mask=mask)]))
    loader = [make_batches(1)[0]]
    trainer.test(Tested(make_smallest_model()), loader, ckpt_path=tmp_path / "epoch-0.ckpt", verbose=False)
    assert torch.equal(torch.rand(1), expected)
