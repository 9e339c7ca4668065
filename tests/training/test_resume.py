# SPDX-License-Identifier: Apache-2.0
"""A resumed fit sees the batches that the uninterrupted one sees, wherever the checkpoint was written."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint, OnExceptionCheckpoint

from lightning_safety.training import CausalLanguageModule, InstructionDataModule
from tests.tiny import make_tiny_model
from tests.training.fits import SaveEverywhere, TraceModule, make_examples, make_trainer

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(weights_only|litlogger|not have many workers|log_every|already exists|not empty)"
)


def make_data(tokenizer: Any, **options: Any) -> InstructionDataModule:
    settings = {"train": make_examples(14), "val": make_examples(3), "batch_size": 4, "tokenizer": tokenizer, **options}
    return InstructionDataModule(**settings)


OPTIONS = [
    {},
    {"limit_train_batches": 3},
    {"accumulate_grad_batches": 2},
    {"limit_val_batches": 0},
    {"limit_val_batches": 0, "limit_train_batches": 3},
    {"val_check_interval": 2},
    {"check_val_every_n_epoch": None, "val_check_interval": 4},
    {"num_sanity_val_steps": 1},
    {"reload_dataloaders_every_n_epochs": 1},
]


CASES = [(length, options) for options in OPTIONS for length in ({"max_epochs": 3}, {"max_steps": 11})]
CASES += [({"max_epochs": 3, "max_steps": 50}, options) for options in OPTIONS[:4]]


@pytest.mark.parametrize(
    ("number", "length", "options"), [(number, *case) for number, case in enumerate(CASES)], ids=str
)
def test_resumes_from_every_place_where_lightning_can_save(
    tiny_tokenizer: Any, tmp_path: Path, number: int, length: dict[str, int], options: dict[str, Any]
) -> None:
    # Reading `estimated_stepping_batches` sets up the loader early, in every second case with either length.
    counts_steps = number // 2 % 2 == 0

    def fit(callbacks: list[pl.Callback], checkpoint: Path | None = None) -> TraceModule:
        module = TraceModule(counts_steps=counts_steps)
        trainer = make_trainer(tmp_path, callbacks, **length, **options)
        trainer.fit(module, datamodule=make_data(tiny_tokenizer), ckpt_path=checkpoint, weights_only=True)
        return module

    saver = SaveEverywhere(tmp_path)
    whole = fit([saver])
    assert len(saver.saved) > 8
    for first, (path, seen) in enumerate(saver.saved.items()):
        again = SaveEverywhere(tmp_path / f"second-{first}")
        resumed = fit([again], path)
        assert resumed.seen == whole.seen[seen:], path.name
        assert torch.equal(resumed.weight, whole.weight), path.name
        # A fit may be interrupted more than once.
        for second, (later, more) in enumerate(again.saved.items()):
            if (first + second) % 8 == 0:
                twice = fit([], later)
                assert twice.seen == whole.seen[seen + more :], f"{path.name}, {later.name}"
                assert torch.equal(twice.weight, whole.weight)


class Interrupt(pl.Callback):
    def __init__(self, hook: str, step: int) -> None:
        self.hook, self.step = hook, step

    def _interrupt(self, hook: str, trainer: pl.Trainer) -> None:
        if hook == self.hook and trainer.fit_loop.total_batch_idx == self.step:
            raise ZeroDivisionError

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._interrupt("on_train_batch_start", trainer)

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        self._interrupt("on_before_backward", trainer)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._interrupt("on_train_batch_end", trainer)


@pytest.mark.parametrize("step", [1, 4, 5])
@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_before_backward", "on_train_batch_end"])
def test_resumes_from_a_checkpoint_written_on_an_exception(
    tiny_tokenizer: Any, tmp_path: Path, hook: str, step: int
) -> None:
    whole = TraceModule()
    make_trainer(tmp_path, max_epochs=3).fit(whole, datamodule=make_data(tiny_tokenizer))
    interrupted = TraceModule()
    checkpoint = OnExceptionCheckpoint(tmp_path)
    with pytest.raises(ZeroDivisionError):
        make_trainer(tmp_path, [Interrupt(hook, step), checkpoint], max_epochs=3).fit(
            interrupted, datamodule=make_data(tiny_tokenizer)
        )
    path = tmp_path / "on_exception.ckpt"
    resumed = TraceModule()
    make_trainer(tmp_path, max_epochs=3).fit(resumed, datamodule=make_data(tiny_tokenizer), ckpt_path=path)
    assert resumed.seen == whole.seen[-len(resumed.seen) :]
    assert len(resumed.seen) == len(whole.seen) - step - (hook == "on_train_batch_end")
    assert torch.equal(resumed.weight, whole.weight)


def test_lightning_finds_the_loader_resumable(tiny_tokenizer: Any, tmp_path: Path) -> None:
    saver = SaveEverywhere(tmp_path)
    make_trainer(tmp_path, [saver], max_epochs=1).fit(TraceModule(), datamodule=make_data(tiny_tokenizer))
    path = next(iter(saver.saved))
    state = torch.load(path, weights_only=True)
    assert state["loops"]["fit_loop"]["state_dict"]["combined_loader"] == [{"epoch": 0, "position": 1}]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(tmp_path, max_epochs=2).fit(
            TraceModule(), datamodule=make_data(tiny_tokenizer), ckpt_path=path, weights_only=True
        )
    assert [str(warning.message) for warning in caught if "LeafSpec" not in str(warning.message)] == []


@pytest.mark.parametrize(
    "change", [{"batch_size": 3}, {"seed": 5}, {"train": make_examples(13)}, {"max_length": 40}], ids=str
)
def test_other_data_than_the_checkpoints_are_noticed(
    tiny_tokenizer: Any, tmp_path: Path, change: dict[str, Any]
) -> None:
    saver = SaveEverywhere(tmp_path)
    make_trainer(tmp_path, [saver], max_epochs=1).fit(TraceModule(), datamodule=make_data(tiny_tokenizer))
    path = next(iter(saver.saved))
    with pytest.warns(UserWarning, match="training data differ from those of the checkpoint"):
        make_trainer(tmp_path, max_epochs=1).fit(
            TraceModule(), datamodule=make_data(tiny_tokenizer, **change), ckpt_path=path, weights_only=True
        )


def test_a_language_model_with_schedule_and_validation_ends_with_the_same_bits(
    tiny_tokenizer: Any, tmp_path: Path
) -> None:
    def fit(callbacks: list[pl.Callback], checkpoint: Path | None = None) -> dict[str, torch.Tensor]:
        module = CausalLanguageModule(
            make_tiny_model(),
            tokenizer=tiny_tokenizer,
            learning_rate=1e-2,
            schedule="cosine",
            warmup_fraction=0.2,
            retention_weight=0.5,
        )
        sources = [
            {"source": make_examples(9), "share": 0.5},
            {"source": make_examples(9, "other"), "share": 0.5, "retention": True},
        ]
        data = make_data(tiny_tokenizer, train=sources)
        trainer = make_trainer(tmp_path, callbacks, max_epochs=3, accumulate_grad_batches=2, gradient_clip_val=1.0)
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        return {name: value.clone() for name, value in module.state_dict().items()}

    checkpoint = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    whole = fit([checkpoint])
    paths = sorted(tmp_path.glob("*.ckpt"))
    assert len(paths) == 9
    for path in paths:
        resumed = fit([], path)
        assert all(torch.equal(resumed[name], whole[name]) for name in whole), path.name


def test_a_second_fit_and_a_longer_fit_go_on_with_the_epochs(tiny_tokenizer: Any, tmp_path: Path) -> None:
    whole, parts = TraceModule(), TraceModule()
    make_trainer(tmp_path, max_epochs=3).fit(whole, datamodule=make_data(tiny_tokenizer))
    trainer, data = make_trainer(tmp_path, max_epochs=1), make_data(tiny_tokenizer)
    trainer.fit(parts, datamodule=data)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(parts, datamodule=data)
    assert parts.seen == whole.seen


def test_overfitting_repeats_the_same_batches(tiny_tokenizer: Any, tmp_path: Path) -> None:
    module = TraceModule()
    make_trainer(tmp_path, max_epochs=3, overfit_batches=2).fit(module, datamodule=make_data(tiny_tokenizer))
    contents = [content for _, _, content in module.seen]
    assert contents[:2] == contents[2:4] == contents[4:]
