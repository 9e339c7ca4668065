# SPDX-License-Identifier: Apache-2.0
"""Two processes train and evaluate on the rows of one, each on its own, and go on with them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.tensor import DTensor

from lightning_safety.callbacks import HarmfulnessMonitor, SafetyPreservingAdaptation
from lightning_safety.data import Example
from lightning_safety.language import load_causal_lm
from lightning_safety.processes import rank, world_size
from lightning_safety.training import CausalLanguageModule, InstructionDataModule
from lightning_safety.training.export import export_checkpoint
from lightning_safety.training.own_replies import encode_own_replies
from tests.callbacks.processes import whole_weights
from tests.spawned import run_in_processes
from tests.tiny import make_tiny_model, make_tiny_tokenizer

ROWS = [
    Example(f"Say the number {index}, and say it {'very ' * (index % 5)}loudly.", f"It is {index}.")
    for index in range(16)
]
MIXTURE = [
    {"source": ROWS[:6], "share": 0.25, "retention": True},
    {"source": ROWS[6:], "share": 0.5, "weight": 2.0},
    {"source": ROWS[:6], "share": 0.25, "response": "No.", "max_response_tokens": 1, "unlikely": True},
]
HELD_OUT = ROWS[:5]


class Seen(pl.Callback):
    """Keeps the rows that were trained on, batch by batch."""

    def __init__(self) -> None:
        self.batches: list[list[list[int]]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: dict[str, Tensor], batch_idx: int) -> None:
        lengths = batch["attention_mask"].sum(dim=1).tolist()
        self.batches.append([row[:length] for row, length in zip(batch["input_ids"].tolist(), lengths, strict=True)])


class Plain(CausalLanguageModule):
    """Steps by plain gradient descent, so that sums in another order stay small differences."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def fit(
    folder: Path,
    rows: Any,
    batch_size: int,
    *,
    steps: int = 8,
    ckpt_path: Path | None = None,
    devices: int = 1,
    strategy: str = "ddp",
    callbacks: Callable[[], list[pl.Callback]] = list,
    **options: Any,
) -> dict[str, Any]:
    """Fit, validate after every epoch, keep a checkpoint in the middle, and return what came of it."""
    chosen: Any = strategy if devices > 1 else "auto"
    if chosen == "fsdp2":
        chosen = ModelParallelStrategy(data_parallel_size=devices, tensor_parallel_size=1)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    module = Plain(make_tiny_model(), tokenizer=make_tiny_tokenizer(), **options)
    data = InstructionDataModule(rows, HELD_OUT, batch_size=batch_size, seed=3)
    seen = Seen()
    checkpoint = pl.callbacks.ModelCheckpoint(folder / "kept", every_n_train_steps=3, save_top_k=-1, filename="{step}")
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=chosen,
        max_steps=steps,
        max_epochs=-1,
        callbacks=[*callbacks(), seen, checkpoint],
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return {
        "weights": whole_weights(module.model),
        "sharded": any(isinstance(weight, DTensor) for weight in module.model.parameters()),
        "seen": seen.batches,
        "loss": float(trainer.callback_metrics["val/loss"]),
        "trained": {name: float(v) for name, v in trainer.callback_metrics.items() if name.startswith("train/")},
        "epochs": trainer.current_epoch,
    }


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("rows", "options"),
    [
        (ROWS, {}),
        (ROWS, {"loss_average": "example"}),
        (ROWS[:15], {}),
        (MIXTURE, {}),
        (MIXTURE, {"loss_average": "example"}),
        (MIXTURE, {"retention_weight": 0.5}),
    ],
    ids=["plain", "by example", "a short batch", "mixture", "mixture by example", "retention"],
)
def test_two_processes_train_as_one_with_twice_the_batch(rows: Any, options: dict[str, Any], tmp_path: Path) -> None:
    """Whatever each one's batch counts: tokens, weights, or no row at all of those that are to be retained."""
    alone = fit(tmp_path / "alone", rows, 4, **options)
    (tmp_path / "together").mkdir()
    first, second = run_in_processes(
        tmp_path / "together", partial(fit, tmp_path / "fit", rows, 2, devices=2, **options)
    )
    assert first["epochs"] == alone["epochs"] == 2
    for mine, others, both in zip(first["seen"], second["seen"], alone["seen"], strict=True):
        assert len(mine) + len(others) == len(both)
        assert sorted(mine + others) == sorted(both)
    assert_close(first["weights"], second["weights"])
    assert_close(first["weights"], alone["weights"])
    assert first["loss"] == second["loss"] == pytest.approx(alone["loss"], abs=1e-6)
    assert first["trained"] == second["trained"] == pytest.approx(alone["trained"], abs=1e-5)
    assert ("train/retention" in first["trained"]) == ("retention_weight" in options)


def test_a_resumed_fit_goes_on_with_the_rows_that_were_left(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("whole", "resumed")]
    for folder in folders:
        folder.mkdir()
    whole = run_in_processes(folders[0], partial(fit, tmp_path / "fit", ROWS, 2, devices=2))
    (checkpoint,) = (tmp_path / "fit" / "kept").glob("step=6*.ckpt")
    resumed = run_in_processes(folders[1], partial(fit, tmp_path / "again", ROWS, 2, devices=2, ckpt_path=checkpoint))
    for before, after in zip(whole, resumed, strict=True):
        assert after["seen"] == before["seen"][6:]
        assert all(torch.equal(weight, before["weights"][name]) for name, weight in after["weights"].items())
    # And in one process, whose batches are as large as those of both.
    alone = fit(tmp_path / "alone", ROWS, 4, ckpt_path=checkpoint)
    for row, mine, others in zip(alone["seen"], whole[0]["seen"][6:], whole[1]["seen"][6:], strict=True):
        assert sorted(row) == sorted(mine + others)


def held() -> list[pl.Callback]:
    return [SafetyPreservingAdaptation(0.1, method="random"), HarmfulnessMonitor(2, prompts=3, max_new_tokens=2)]


def test_a_model_spread_over_two_processes_trains_as_whole(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("whole", "resumed")]
    for folder in folders:
        folder.mkdir()
    shared: dict[str, Any] = {"devices": 2, "strategy": "fsdp2", "callbacks": held}
    alone = fit(tmp_path / "alone", ROWS, 4, callbacks=held)
    first, second = run_in_processes(folders[0], partial(fit, tmp_path / "fit", ROWS, 2, **shared))
    assert first["sharded"]
    assert not alone["sharded"]
    assert_close(first["weights"], alone["weights"])
    assert first["loss"] == second["loss"] == pytest.approx(alone["loss"], abs=1e-5)
    checkpoint = tmp_path / "fit" / "kept" / "step=6.ckpt"
    resumed = run_in_processes(folders[1], partial(fit, tmp_path / "again", ROWS, 2, ckpt_path=checkpoint, **shared))
    for before, after in zip((first, second), resumed, strict=True):
        assert after["seen"] == before["seen"][6:]
        assert all(torch.equal(weight, before["weights"][name]) for name, weight in after["weights"].items())
    # As the error of `export` says.
    with pytest.raises(FileNotFoundError, match=r"format_utils dcp_to_torch .*step=6\.ckpt FILE"):
        export_checkpoint(checkpoint, tmp_path / "exported")
    dcp_to_torch_save(checkpoint, tmp_path / "whole.ckpt")
    make_tiny_model().save_pretrained(tmp_path / "base")
    make_tiny_tokenizer().save_pretrained(tmp_path / "base")
    folder = export_checkpoint(tmp_path / "whole.ckpt", tmp_path / "exported", base=tmp_path / "base")
    sixth = fit(tmp_path / "sixth", ROWS, 4, steps=6, callbacks=held)
    assert_close(dict(load_causal_lm(folder, dtype="float32").named_parameters()), sixth["weights"])


@pytest.mark.parametrize("options", [{"lora": {}}, {"retention_weight": 0.5}], ids=["lora", "retention"])
def test_what_is_not_spread_is_refused(options: dict[str, Any], tmp_path: Path) -> None:
    work = partial(fit, tmp_path / "fit", ROWS, 2, devices=2, strategy="fsdp2", **options)
    for error in run_in_processes(tmp_path, work):
        assert "expected a strategy that leaves the model whole but got ModelParallelStrategy" in error


def validate(count: int) -> tuple[float, int]:
    warnings.simplefilter("ignore")
    module = Plain(make_tiny_model(), tokenizer=make_tiny_tokenizer())
    data = InstructionDataModule(ROWS, ROWS[:count], batch_size=2)
    strategy = "ddp" if world_size() > 1 or rank() else "auto"
    trainer = pl.Trainer(
        accelerator="cpu", devices=max(1, world_size()), strategy=strategy, logger=False, enable_progress_bar=False
    )
    (found,) = trainer.validate(module, datamodule=data, verbose=False)
    return found["val/loss"], len(data.val_dataloader())


@pytest.mark.parametrize("count", [1, 5, 8])
def test_every_row_is_validated_on_once(count: int, tmp_path: Path) -> None:
    expected, _ = validate(count)
    found = run_in_processes(tmp_path, partial(validate, count))
    assert found[0] == found[1]
    assert found[0][0] == pytest.approx(expected, abs=1e-6)


def other_rows() -> None:
    warnings.simplefilter("ignore")
    fit(Path("nowhere"), ROWS[rank() :], 2, devices=2)


def test_other_rows_in_other_processes_are_refused(tmp_path: Path) -> None:
    for error in run_in_processes(tmp_path, other_rows):
        assert "`train` expected" in error
        assert "Give all processes the same files" in error


def other_validation_rows() -> None:
    warnings.simplefilter("ignore")
    module = Plain(make_tiny_model(), tokenizer=make_tiny_tokenizer())
    data = InstructionDataModule(ROWS, ROWS[rank() :], batch_size=2)
    pl.Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False).validate(module, datamodule=data)


def missing_in_one() -> None:
    warnings.simplefilter("ignore")
    fit(Path("nowhere"), ROWS if rank() else "missing.jsonl", 2, devices=2)


def test_other_or_missing_rows_in_one_process_end_both(tmp_path: Path) -> None:
    for name, work, message in (
        ("other", other_validation_rows, "`val` expected"),
        ("missing", missing_in_one, "missing.jsonl"),
    ):
        (tmp_path / name).mkdir()
        for error in run_in_processes(tmp_path / name, work):
            assert message in error


def test_a_fit_that_goes_on_with_fewer_batches_an_epoch_is_warned_of(tmp_path: Path) -> None:
    """Of nine rows, one process trains on three batches, and four processes on two: the short one is left out."""
    fit(tmp_path, ROWS[:9], 4, steps=3)
    data = InstructionDataModule(ROWS[:9], batch_size=1, seed=3, tokenizer=make_tiny_tokenizer())
    four = {"num_replicas": 4, "rank": 0}
    data.trainer = SimpleNamespace(distributed_sampler_kwargs={"num_replicas": 1, "rank": 0}, lightning_module=None)  # type: ignore[assignment]
    data.setup("fit")
    data.trainer.distributed_sampler_kwargs = four  # type: ignore[misc, union-attr]
    (checkpoint,) = (tmp_path / "kept").glob("*.ckpt")
    saved = torch.load(checkpoint, weights_only=True)["InstructionDataModule"]
    with pytest.warns(UserWarning, match="or batches of an epoch"):
        data.load_state_dict(saved)


def reply() -> list[list[int]]:
    rows = encode_own_replies(
        ROWS[:5], make_tiny_model(), make_tiny_tokenizer(), max_new_tokens=3, shared=world_size() > 1
    )
    return [row.input_ids for row in rows]


def test_replies_are_shared_out_and_all_have_them(tmp_path: Path) -> None:
    found = run_in_processes(tmp_path, reply)
    assert found[0] == found[1] == reply()


def too_few() -> None:
    fit(Path("nowhere"), ROWS[:1], 2, devices=2)


def test_fewer_rows_than_processes_are_refused(tmp_path: Path) -> None:
    for error in run_in_processes(tmp_path, too_few):
        assert "`train` expected a row for each of 2 processes but has 1" in error
