# SPDX-License-Identifier: Apache-2.0
"""Two processes that share a model (FSDP2) train its selected weights, and nothing else, as one process does."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch import Tensor

from lightning_safety.callbacks import SafetyEnhancementTuning
from lightning_safety.enforcement import SafetyPatch
from lightning_safety.scoring import RefusalMargin, SafetyMask
from tests.callbacks.processes import Sharded, fit_alone, fit_together, sgd
from tests.callbacks.processes import make_uneven_model as make_model
from tests.callbacks.toys import OwnModule, adamw, assert_acted, mask_of_everything, weights_of
from tests.tiny import make_tiny_tokenizer

STEPS = 6


def mask_of_some() -> SafetyMask:
    """Of some tensors nothing is selected, of one nothing that the second process holds."""
    mask = mask_of_everything(make_model())
    indices = {name: index if name.endswith("proj.weight") else index[:0] for name, index in mask.indices.items()}
    name = next(iter(name for name in indices if name.endswith("down_proj.weight")))
    return SafetyMask({**indices, name: torch.tensor([0, 5, 9], dtype=indices[name].dtype)}, mask.shapes)


def make_module(kind: type[OwnModule], **options: Any) -> OwnModule:
    return kind(make_model(), sgd, **options)


def given(folder: Path | None = None) -> list[Any]:
    return [SafetyEnhancementTuning(mask=mask_of_some(), patch=folder and folder / "patch.safetensors")]


def assert_only_selected_changed(together: dict[str, Tensor], mask: SafetyMask) -> None:
    model = make_model()
    before = weights_of(model)
    model.load_state_dict(together, strict=False)
    assert_acted(SafetyEnhancementTuning, model, before, mask)


@pytest.mark.parametrize(
    ("options", "of_module"),
    [
        # The norm that clips is that of all selected weights in all processes.
        ({"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}, {}),
        ({}, {"manual": True, "accumulate": 3, "clip": "norm"}),
        ({"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}, {}),
    ],
)
def test_two_processes_train_as_one(tmp_path: Path, options: dict[str, Any], of_module: dict[str, Any]) -> None:
    make = partial(make_module, **of_module)
    together = fit_together(
        tmp_path,
        "fsdp2",
        partial(make, Sharded),
        partial(given, tmp_path),
        steps=STEPS,
        num_sanity_val_steps=1,
        **options,
    )
    for name, weight in fit_alone(make(OwnModule), given(), steps=STEPS, **options).items():
        torch.testing.assert_close(together[name], weight, rtol=1e-5, atol=1e-6)
    assert_only_selected_changed(together, mask_of_some())
    model = make_model()
    SafetyPatch.load(tmp_path / "patch.safetensors").apply(model)
    assert all(torch.equal(weight, together[name]) for name, weight in model.named_parameters())


def make_resumable(tokenizer: bool = True) -> OwnModule:
    """Each process draws its own random numbers, as data and dropout may."""
    torch.manual_seed(int(os.environ.get("RANK", "0")))
    options = {"tokenizer": make_tiny_tokenizer()} if tokenizer else {}
    return Sharded(make_model(attention_dropout=0.2), adamw, **options)


def scored(folder: Path, saved: bool, **options: Any) -> list[Any]:
    settings = {"batch_size": 1, "save_mask": folder / f"{os.getpid()}.mask", "patch": folder / "patch.safetensors"}
    enhancing = SafetyEnhancementTuning(0.05, objective=RefusalMargin(limit=3), **{**settings, **options})
    saver = ModelCheckpoint(dirpath=folder, filename="{epoch}", save_top_k=-1)
    return [enhancing, saver] if saved else [enhancing]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """Where an uninterrupted fit of two epochs has left its files, and its weights."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, fit_together(folder, "fsdp2", make_resumable, partial(scored, folder, True), **RESUMED)


RESUMED: dict[str, Any] = {"steps": 3, "max_epochs": 2, "num_sanity_val_steps": 1}


def test_scored_together_and_resumed_as_if_uninterrupted(tmp_path: Path, saved: tuple[Path, dict[str, Tensor]]) -> None:
    whole, uninterrupted = saved
    again = fit_together(
        tmp_path,
        "fsdp2",
        partial(make_resumable, False),
        partial(scored, tmp_path, False),
        ckpt_path=whole / "epoch=0.ckpt",
        **RESUMED,
    )
    for name, weight in uninterrupted.items():
        assert torch.equal(weight, again[name]), name
    # Only one process writes.
    (found,), (kept,) = whole.glob("*.mask"), tmp_path.glob("*.mask")
    mask = SafetyMask.load(found)
    assert SafetyMask.load(kept) == mask
    assert_only_selected_changed(uninterrupted, mask)
    for folder in (whole, tmp_path):
        model = make_model()
        SafetyPatch.load(folder / "patch.safetensors").apply(model)
        assert all(torch.equal(weight, uninterrupted[name]) for name, weight in model.named_parameters())


def test_a_checkpoint_in_one_file_is_resumed_too(tmp_path: Path, saved: tuple[Path, dict[str, Tensor]]) -> None:
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder, options in zip(folders, [{}, {"ckpt_path": folders[0] / "epoch=0.ckpt"}], strict=True):
        folder.mkdir()
        make = partial(scored, folder, folder == folders[0])
        ended = fit_together(folder, "fsdp2, one file", make_resumable, make, **RESUMED, **options)
        for name, weight in saved[1].items():
            assert torch.equal(weight, ended[name]), name
    assert (folders[0] / "epoch=0.ckpt").is_file()


def test_a_checkpoint_saved_after_a_fit_is_resumed(tmp_path: Path, saved: tuple[Path, dict[str, Tensor]]) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    path = tmp_path / "after.ckpt"
    ended = {**RESUMED, "max_epochs": 1, "saved_after": path}
    fit_together(first, "fsdp2", make_resumable, partial(scored, first, False), **ended)
    again = fit_together(second, "fsdp2", make_resumable, partial(scored, second, False), **RESUMED, ckpt_path=path)
    for name, weight in saved[1].items():
        assert torch.equal(weight, again[name]), name


class FailsInBoth(pl.Callback):
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 2:
            raise RuntimeError("both fail")


def failing(folder: Path) -> list[Any]:
    return [*scored(folder, False), OnExceptionCheckpoint(folder, "failed"), FailsInBoth()]


def test_a_checkpoint_saved_after_an_error_says_so_when_it_is_resumed(tmp_path: Path) -> None:
    """The optimizers' states are gone by then."""
    with pytest.raises(RuntimeError, match="both fail"):
        fit_together(tmp_path, "fsdp2", make_resumable, partial(failing, tmp_path), **RESUMED)
    make = partial(scored, tmp_path, False)
    with pytest.raises(RuntimeError, match="saved under one that leaves the model whole, or after an error"):
        fit_together(tmp_path, "fsdp2", make_resumable, make, **RESUMED, ckpt_path=tmp_path / "failed.ckpt")


def test_other_arguments_are_named_when_a_checkpoint_is_resumed(
    tmp_path: Path, saved: tuple[Path, dict[str, Tensor]]
) -> None:
    make = partial(scored, tmp_path, False, method="bottom")
    with pytest.raises(
        Exception, match=r"with what its optimizers hold, but it has SafetyEnhancementTuning\{'fraction'"
    ):
        fit_together(tmp_path, "fsdp2", make_resumable, make, **RESUMED, ckpt_path=saved[0] / "epoch=0.ckpt")


def test_one_process_takes_up_what_two_have_saved(tmp_path: Path, saved: tuple[Path, dict[str, Tensor]]) -> None:
    """Without dropout, momentum and all, it goes on as they would."""
    whole, _ = saved
    options = {**RESUMED, "ckpt_path": whole / "epoch=0.ckpt"}
    ends = {}
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        ends[processes] = fit_together(
            folder,
            "fsdp2",
            make_without_dropout,
            partial(scored, folder, False),
            processes=processes,
            rows_a_step=2,
            **options,
        )
    for name, weight in ends[2].items():
        torch.testing.assert_close(ends[1][name], weight, rtol=1e-4, atol=1e-5)
    assert_only_selected_changed(ends[1], SafetyMask.load(next(whole.glob("*.mask"))))


def make_without_dropout() -> OwnModule:
    return Sharded(make_model(), adamw)


def averaged() -> list[Any]:
    return [SafetyEnhancementTuning(mask=mask_of_some(), average_last=2)]


def test_a_mean_of_the_last_steps_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="`average_last=2` expected a strategy that leaves the model whole but"):
        fit_together(tmp_path, "fsdp2", partial(make_module, Sharded), averaged, steps=1, max_steps=1)


def test_a_checkpoint_of_another_strategy_is_refused(tmp_path: Path) -> None:
    """It has the optimizer's state elsewhere."""
    saver = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)
    enhancing = SafetyEnhancementTuning(0.05, objective=RefusalMargin(limit=3))
    fit_alone(OwnModule(make_model(), adamw, tokenizer=make_tiny_tokenizer()), [enhancing, saver], steps=1)
    with pytest.raises(
        Exception, match="`ckpt_path` expected to have the optimizers' states as a fit does whose strategy shards"
    ):
        fit_together(
            tmp_path,
            "fsdp2",
            make_resumable,
            partial(scored, tmp_path, False),
            steps=1,
            max_epochs=2,
            ckpt_path=tmp_path / "epoch=0.ckpt",
        )
