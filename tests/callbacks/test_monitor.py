# SPDX-License-Identifier: Apache-2.0
"""When a monitor looks: by steps, epochs, at start and end, once each, in an uninterrupted fit and a resumed one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint

from tests.callbacks.fits import (
    ScriptedJudge,
    UserModule,
    fit,
    make_loader,
    make_monitor,
    make_trainer,
    read_lines,
    read_steps,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*(litlogger|not have many workers|log_every|not empty|mid-epoch)")


@pytest.mark.parametrize(
    ("schedule", "options", "steps"),
    [
        ({"every_n_steps": 2}, {"max_steps": 5}, [0, 2, 4, 5]),
        ({"every_n_steps": 2}, {"max_steps": 4}, [0, 2, 4]),
        ({"every_n_steps": 2, "at_start": False, "at_end": False}, {"max_steps": 5}, [2, 4]),
        ({"every_n_steps": 100}, {"max_epochs": 1}, [0, 6]),
        ({"every_n_steps": None, "at_end": False}, {"max_epochs": 1}, [0]),
        ({"every_n_steps": None, "at_start": False, "at_end": False}, {"max_epochs": 1}, []),
        ({"every_n_steps": None, "every_n_epochs": 1}, {"max_epochs": 3}, [0, 6, 12, 18]),
        ({"every_n_steps": None, "every_n_epochs": 2}, {"max_epochs": 3}, [0, 12, 18]),
        ({"every_n_steps": 4, "every_n_epochs": 1}, {"max_epochs": 2}, [0, 4, 6, 8, 12]),
        ({"every_n_steps": 1}, {"max_epochs": 1, "accumulate_grad_batches": 4}, [0, 1, 2]),
        ({"every_n_steps": 1}, {"max_steps": 3, "accumulate_grad_batches": 3}, [0, 1, 2, 3]),
        ({"every_n_steps": 3}, {"max_epochs": 2, "limit_val_batches": 1, "num_sanity_val_steps": 1}, [0, 3, 6, 9, 12]),
        ({"every_n_steps": 3}, {"max_steps": 3, "log_every_n_steps": 50}, [0, 3]),
    ],
    ids=str,
)
def test_looks_once_at_each_step_that_is_due(
    tiny_tokenizer: Any, tmp_path: Path, schedule: dict[str, Any], options: dict[str, Any], steps: list[int]
) -> None:
    judge = ScriptedJudge()
    fit(tiny_tokenizer, tmp_path, [make_monitor(judges=judge, **schedule)], **options)
    assert judge.checks == len(steps)
    assert (read_steps(tmp_path) if steps else []) == steps


class _TwoOptimizers(UserModule):
    """Steps twice a batch: the trainer counts both."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer)
        self.automatic_optimization = False

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> None:  # type: ignore[override]
        optimizers: Any = self.optimizers()
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        head, rest = [self.network.lm_head.weight], list(self.network.model.parameters())
        return [torch.optim.SGD(weights, lr=1e-3) for weights in (head, rest)]


def test_a_multiple_that_is_jumped_over_is_not_lost(tiny_tokenizer: Any, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, [make_monitor(every_n_steps=3)], max_epochs=1)
    trainer.fit(_TwoOptimizers(tiny_tokenizer), make_loader())
    assert read_steps(tmp_path) == [0, 4, 6, 10, 12]


class _Reader(pl.Callback):
    """Reads callback_metrics where checkpoints are chosen."""

    def __init__(self) -> None:
        self.read: list[tuple[str, float]] = []

    def _note(self, hook: str, trainer: pl.Trainer) -> None:
        self.read.append((hook, round(trainer.callback_metrics["safety/attack_success_rate"].item(), 3)))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._note("validation", trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._note("epoch", trainer)


def test_callback_metrics_hold_the_last_check_wherever_they_are_read(tiny_tokenizer: Any, tmp_path: Path) -> None:
    # Checks at steps 0, 4, 8 and 12; epochs end at 6 and 12.
    monitor, reader = make_monitor(every_n_steps=4, judges=ScriptedJudge([5, 4, 3, 2])), _Reader()
    options: dict[str, Any] = {"max_epochs": 2, "limit_val_batches": 1, "val_check_interval": 3}
    trainer, _ = fit(tiny_tokenizer, tmp_path, [monitor, reader], **options)
    assert reader.read == [
        ("validation", 1.0),
        ("validation", 0.8),
        ("epoch", 0.8),
        ("validation", 0.6),
        ("validation", 0.4),
        ("epoch", 0.4),
    ]
    assert trainer.callback_metrics["safety/attack_success_rate"] == pytest.approx(0.4)


@pytest.mark.parametrize("options", [{"every_n_train_steps": 2}, {"every_n_epochs": 1}], ids=str)
def test_model_checkpoint_keeps_the_safest(tiny_tokenizer: Any, tmp_path: Path, options: dict[str, Any]) -> None:
    monitor = make_monitor(every_n_steps=2, judges=ScriptedJudge([5, 4, 3, 1, 3, 2, 4]))
    checkpoint = ModelCheckpoint(tmp_path, "{step}", monitor="safety/attack_success_rate", save_top_k=1, **options)
    fit(tiny_tokenizer, tmp_path, [checkpoint, monitor], max_epochs=2, limit_val_batches=1)
    assert Path(checkpoint.best_model_path).name == "step=6.ckpt"
    assert checkpoint.best_model_score == pytest.approx(0.2)


def test_early_stopping_ends_with_a_check(tiny_tokenizer: Any, tmp_path: Path) -> None:
    monitor = make_monitor(every_n_steps=4, judges=ScriptedJudge([1, 2, 5]))
    stopper = EarlyStopping("safety/attack_success_rate", stopping_threshold=0.5, mode="min", patience=9)
    trainer, _ = fit(tiny_tokenizer, tmp_path, [stopper, monitor], max_epochs=9, limit_val_batches=1)
    assert read_steps(tmp_path) == [0, 4, 6]
    # The last check is of on_train_end, in which Lightning allows no self.log.
    assert trainer.callback_metrics["safety/attack_success_rate"] == 1


class _Kill(pl.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            raise ZeroDivisionError


@pytest.mark.parametrize("same_folder", [True, False])
@pytest.mark.parametrize(("killed", "saved"), [(5, 2), (5, 3), (5, 4), (11, 6), (11, 9)])
def test_a_resumed_fit_has_the_checks_of_an_uninterrupted_one(
    tiny_tokenizer: Any, tmp_path: Path, killed: int, saved: int, same_folder: bool
) -> None:
    def make(*others: pl.Callback) -> list[pl.Callback]:
        return [make_monitor(every_n_steps=2, every_n_epochs=1), *others]

    whole, first = tmp_path / "whole", tmp_path / "first"
    second = first if same_folder else tmp_path / "second"
    fit(tiny_tokenizer, whole, make(), max_epochs=2)
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    with pytest.raises(ZeroDivisionError):
        fit(tiny_tokenizer, first, make(saver, _Kill(killed)), max_epochs=2)
    fit(tiny_tokenizer, second, make(), max_epochs=2, ckpt_path=tmp_path / f"step={saved}.ckpt")
    expected = [0, 2, 4, 6, 8, 10, 12]
    assert read_steps(whole) == expected
    if same_folder:
        assert sorted(read_steps(first)) == expected
        lines = [line for line in read_lines(first, "safety_replies.jsonl") if "step" in line]
        replies = [(line["step"], line["prompt"]) for line in lines]
        assert len(replies) == len(set(replies)) == 10 * len(expected)
    else:
        assert read_steps(second) == [step for step in expected if step > saved]
        runs = {line["run"] for folder in (first, second) for line in read_lines(folder)}
        assert len(runs) == 1


def test_a_check_that_was_due_when_a_checkpoint_was_saved_is_made_up_for(tiny_tokenizer: Any, tmp_path: Path) -> None:
    class SaveFirst(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *arguments: Any) -> None:
            if trainer.global_step == 4:
                trainer.save_checkpoint(tmp_path / "early.ckpt")

    fit(tiny_tokenizer, tmp_path / "first", [SaveFirst(), make_monitor(every_n_steps=2)], max_steps=5)
    early = tmp_path / "early.ckpt"
    fit(tiny_tokenizer, tmp_path / "second", [make_monitor(every_n_steps=2)], max_steps=5, ckpt_path=early)
    assert read_steps(tmp_path / "second") == [4, 5]


def test_a_checkpoint_without_our_state_starts_a_run_of_checks(tiny_tokenizer: Any, tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3, save_top_k=-1)
    fit(tiny_tokenizer, tmp_path, [saver], max_steps=3)
    monitor = make_monitor(every_n_steps=2)
    fit(tiny_tokenizer, tmp_path, [monitor], max_steps=7, ckpt_path=tmp_path / "step=3.ckpt")
    assert read_steps(tmp_path) == [3, 4, 6, 7]


def test_a_second_fit_is_another_run_and_a_longer_one_the_same(tiny_tokenizer: Any, tmp_path: Path) -> None:
    monitor = make_monitor(every_n_steps=2)
    fit(tiny_tokenizer, tmp_path, [monitor], max_steps=2)
    trainer, module = fit(tiny_tokenizer, tmp_path, [monitor], max_epochs=1)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, make_loader())
    lines = list(read_lines(tmp_path))
    assert [line["step"] for line in lines] == [0, 2, 0, 2, 4, 6, 8, 10, 12]
    assert len({line["run"] for line in lines}) == 2


def test_lines_go_to_the_folder_of_the_first_logger(tiny_tokenizer: Any, tmp_path: Path) -> None:
    class Elsewhere(pl.loggers.logger.Logger):
        """Like Weights & Biases: one folder for all runs, and no `log_dir`."""

        save_dir = str(tmp_path)
        name = "project"
        version = "run-3"

        def log_metrics(self, metrics: Any, step: int | None = None) -> None: ...

        def log_hyperparams(self, params: Any) -> None: ...

    fit(tiny_tokenizer, tmp_path, [make_monitor(every_n_steps=None)], max_steps=1, logger=Elsewhere())
    assert read_steps(tmp_path / "project" / "run-3") == [0, 1]
