# SPDX-License-Identifier: Apache-2.0
"""Two processes that train copies of a model (DDP) hold and enhance as one does."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.plugins import MixedPrecision
from torch import Tensor, nn

from lightning_safety.callbacks import SafetyEnhancementTuning, SafetyPreservingAdaptation
from lightning_safety.callbacks.selected import SelectedWeightsCallback
from lightning_safety.enforcement import SafetyPatch
from lightning_safety.scoring import RefusalMargin, SafetyMask
from tests.callbacks.processes import PROCESSES, fit_alone, fit_together, sgd
from tests.callbacks.toys import BOTH, OwnModule, assert_acted, make_smallest_model, mask_of_everything, weights_of
from tests.enforcement.adapters import make_adapted_model, make_mask
from tests.tiny import make_tiny_tokenizer

STEPS = 6
Kind = type[SelectedWeightsCallback]


def make_model(**options: Any) -> nn.Module:
    return make_smallest_model(vocab_size=512, max_position_embeddings=256, **options)


def make_module(**options: Any) -> OwnModule:
    return OwnModule(make_model(), sgd, **options)


def mask_of_some(model: nn.Module) -> SafetyMask:
    """Of some tensors nothing is selected, so that SET freezes them."""
    mask = mask_of_everything(model)
    return SafetyMask(
        {name: index if name.endswith("proj.weight") else index[:0] for name, index in mask.indices.items()},
        mask.shapes,
    )


def given(kind: Kind) -> list[SelectedWeightsCallback]:
    return [kind(mask=mask_of_some(make_model()))]


def assert_close(together: dict[str, Tensor], alone: dict[str, Tensor]) -> None:
    assert list(together) == list(alone)
    for name, weight in alone.items():
        torch.testing.assert_close(together[name], weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "options", "of_module"),
    [
        (SafetyPreservingAdaptation, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}, {}),
        (SafetyEnhancementTuning, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}, {}),
        (SafetyEnhancementTuning, {}, {"manual": True, "accumulate": 3, "clip": "norm"}),
        # Lightning wraps a single process too.
        (SafetyEnhancementTuning, {"processes": 1}, {}),
    ],
)
def test_two_processes_train_as_one(
    tmp_path: Path, kind: Kind, options: dict[str, Any], of_module: dict[str, Any]
) -> None:
    make = partial(make_module, **of_module)
    together = fit_together(tmp_path, "ddp", make, partial(given, kind), steps=STEPS, **options)
    processes = options.pop("processes", PROCESSES)
    assert_close(together, fit_alone(make(), given(kind), steps=STEPS, rows_a_step=processes, **options))
    model = make_model()
    before = weights_of(model)
    model.load_state_dict(together, strict=False)
    assert_acted(kind, model, before, mask_of_some(model))


class Overflowing(OwnModule):
    """In the second process, the gradient of the second batch is not finite."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        bad = batch_idx == 1 and os.environ.get("RANK") == "1"
        return loss * float("inf") if bad else loss


def make_overflowing() -> OwnModule:
    return Overflowing(make_model(), sgd)


def test_a_step_that_overflows_in_one_process_is_skipped_in_both(tmp_path: Path) -> None:
    # `fit_together` makes sure that both end with the same weights.
    scaler = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=256.0))
    together = fit_together(
        tmp_path, "ddp", make_overflowing, partial(given, SafetyEnhancementTuning), steps=4, plugins=[scaler]
    )
    assert all(weight.isfinite().all() for weight in together.values())
    assert any(not torch.equal(weight, together[name]) for name, weight in make_model().named_parameters())


def make_resumable() -> OwnModule:
    """Each process draws its own random numbers, as data and dropout may."""
    torch.manual_seed(int(os.environ.get("RANK", "0")))
    return OwnModule(make_model(attention_dropout=0.2), tokenizer=make_tiny_tokenizer())


def scored(kind: Kind, folder: Path, saved: bool) -> list[Any]:
    callback = kind(0.05, objective=RefusalMargin(limit=3), batch_size=1, save_mask=folder / f"{os.getpid()}.mask")
    if isinstance(callback, SafetyEnhancementTuning):
        callback.patch_file = folder / "patch.safetensors"
    return [callback, ModelCheckpoint(dirpath=folder, filename="{epoch}", save_top_k=-1)] if saved else [callback]


@BOTH
def test_scored_together_and_resumed_as_if_uninterrupted(tmp_path: Path, kind: Kind) -> None:
    options = {"steps": 3, "max_epochs": 2}
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    whole.mkdir()
    resumed.mkdir()
    uninterrupted = fit_together(whole, "ddp", make_resumable, partial(scored, kind, whole, True), **options)
    again = fit_together(
        resumed,
        "ddp",
        make_resumable,
        partial(scored, kind, resumed, False),
        ckpt_path=whole / "epoch=0.ckpt",
        **options,
    )
    for name, weight in uninterrupted.items():
        assert torch.equal(weight, again[name]), name
    # Only one process writes.
    (found,), (kept,) = whole.glob("*.mask"), resumed.glob("*.mask")
    mask = SafetyMask.load(found)
    assert SafetyMask.load(kept) == mask
    alone = kind(0.05, objective=RefusalMargin(limit=3))
    fit_alone(make_resumable(), [alone], steps=1)
    assert alone.mask is not None
    assert mask.overlap(alone.mask) / (mask | alone.mask).count >= 0.99
    # One process takes up what two have saved.
    later = kind(0.05, objective=RefusalMargin(limit=3))
    with pytest.warns(UserWarning, match=r"saved by 2 process\(es\) and is resumed by 1: random numbers do not"):
        resumed_alone = fit_alone(make_resumable(), [later], ckpt_path=whole / "epoch=0.ckpt", **options)
    assert later.mask == mask
    model = make_model()
    before = weights_of(model)
    model.load_state_dict(resumed_alone, strict=False)
    assert_acted(kind, model, before, mask)
    model = make_model()
    if kind is SafetyEnhancementTuning:
        SafetyPatch.load(whole / "patch.safetensors").apply(model)
        assert all(torch.equal(weight, uninterrupted[name]) for name, weight in model.named_parameters())
    model.load_state_dict(uninterrupted, strict=False)
    assert_acted(kind, model, before, mask)


def make_adapted() -> OwnModule:
    return OwnModule(make_adapted_model(), sgd)


def held_adapters() -> list[SelectedWeightsCallback]:
    return [SafetyPreservingAdaptation(mask=make_mask(make_adapted_model()))]


def test_adapters_are_held_as_in_one_process(tmp_path: Path) -> None:
    together = fit_together(tmp_path, "ddp", make_adapted, held_adapters, steps=3)
    assert_close(together, fit_alone(make_adapted(), held_adapters(), steps=3))


def enhanced_adapters() -> list[SelectedWeightsCallback]:
    return [SafetyEnhancementTuning(mask=make_mask(make_adapted_model()))]


def test_enhancing_a_frozen_base_in_two_processes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="`strategy` expected to run in one process where the base is frozen"):
        fit_together(tmp_path, "ddp", make_adapted, enhanced_adapters, steps=1)


def other_mask_in_each() -> list[SelectedWeightsCallback]:
    mask = mask_of_everything(make_model(), 0.1 if os.environ["RANK"] == "0" else 0.2)
    return [SafetyPreservingAdaptation(mask=mask)]


def test_another_mask_in_each_process_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="`mask` expected to be the same in all 2 processes but process 1 has"):
        fit_together(tmp_path, "ddp", make_module, other_mask_in_each, steps=1)


def rescored(folder: Path) -> list[Any]:
    name = os.environ.get("RANK", "alone")
    return [
        SafetyPreservingAdaptation(
            0.05,
            objective=RefusalMargin(limit=3),
            batch_size=1,
            rescore_every_n_steps=2,
            save_mask=folder / f"{name}.mask",
            show_progress=False,
        )
    ]


def test_two_processes_score_again_and_hold_what_one_would(tmp_path: Path) -> None:
    make = partial(make_module, tokenizer=make_tiny_tokenizer())
    # That both end with the same weights is checked there.
    together = fit_together(tmp_path, "ddp", make, partial(rescored, tmp_path), steps=5)
    found = SafetyMask.load(next(tmp_path.glob("[01].mask")))
    (alone,) = rescored(tmp_path)
    weights = fit_alone(make(), [alone], steps=5, rows_a_step=PROCESSES)
    assert alone.mask is not None
    assert found.overlap(alone.mask) / (found | alone.mask).count >= 0.99
    start = SafetyPreservingAdaptation(0.05, objective=RefusalMargin(limit=3), batch_size=1)
    fit_alone(make(), [start], steps=1)
    assert start.mask is not None
    assert found != start.mask
    apart = sum(int((~torch.isclose(together[name], weight, 1e-4, 1e-6)).sum()) for name, weight in weights.items())
    # A weight on the boundary may be held by one and not by the other.
    assert apart <= 0.001 * sum(weight.numel() for weight in weights.values())
