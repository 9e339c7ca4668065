# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import LearningRateMonitor
from pytorch_lightning.loggers import CSVLogger

from lightning_safety.language import find_language_model
from lightning_safety.training import CausalLanguageModule, InstructionDataModule
from tests.tiny import make_tiny_model
from tests.training.fits import make_examples, make_trainer


def make_module(tokenizer: Any, **options: Any) -> CausalLanguageModule:
    return CausalLanguageModule(make_tiny_model(), tokenizer=tokenizer, **{"learning_rate": 1e-2, **options})


def make_data(**options: Any) -> InstructionDataModule:
    return InstructionDataModule(**{"train": make_examples(12), "batch_size": 4, **options})


class Record(pl.Callback):
    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []
        self.rates: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])


def test_learns_and_stays_in_training_mode(tiny_tokenizer: Any, tmp_path: Path, recwarn: Any) -> None:
    module, record = make_module(tiny_tokenizer), Record()
    make_trainer(tmp_path, [record], max_epochs=8, num_sanity_val_steps=1).fit(
        module, datamodule=make_data(val=make_examples(3))
    )
    losses = [metrics["train/loss"] for metrics in record.metrics]
    assert losses[-1] < 0.7 * losses[0]
    assert all(part.training for part in module.modules())
    assert not [warning for warning in recwarn if "eval mode" in str(warning.message)]


def test_loads_from_a_folder_with_its_tokenizer(tiny_tokenizer: Any, tmp_path: Path) -> None:
    make_tiny_model().save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    module = CausalLanguageModule(str(tmp_path), dtype="bfloat16")
    assert module.model.dtype == torch.bfloat16
    assert module.tokenizer.chat_template == tiny_tokenizer.chat_template
    assert module.hparams["source"] == str(tmp_path)
    assert CausalLanguageModule(tmp_path).model.dtype == torch.float32


def test_validation_numbers_are_means_over_tokens_whatever_the_batches(tiny_tokenizer: Any, tmp_path: Path) -> None:
    results = []
    for batch_size in (1, 3, 7):
        data = make_data(val=make_examples(7), test=make_examples(7), batch_size=batch_size)
        trainer, module = make_trainer(tmp_path), make_module(tiny_tokenizer)
        trainer.validate(module, datamodule=data, verbose=False)
        results.append(float(trainer.callback_metrics["val/loss"]))
        assert trainer.callback_metrics["val/perplexity"] == pytest.approx(math.exp(results[-1]), rel=1e-6)
        trainer.test(module, datamodule=data, verbose=False)
        assert float(trainer.callback_metrics["test/loss"]) == results[-1]
    assert results == pytest.approx([results[0]] * 3, rel=1e-6)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [1.0] * 6),
        ({"schedule": "linear"}, [6 / 6, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        ({"schedule": "linear", "warmup_fraction": 0.34}, [1 / 3, 2 / 3, 1, 3 / 4, 2 / 4, 1 / 4]),
        ({"warmup_fraction": 0.5}, [1 / 4, 2 / 4, 3 / 4, 1, 1, 1]),
        ({"schedule": "cosine"}, [0.5 * (1 + math.cos(math.pi * step / 6)) for step in range(6)]),
    ],
)
def test_schedule_spans_the_optimizer_steps(
    tiny_tokenizer: Any, tmp_path: Path, options: dict[str, Any], expected: list[float]
) -> None:
    record = Record()
    trainer = make_trainer(tmp_path, [record], max_epochs=3, accumulate_grad_batches=2)
    trainer.fit(make_module(tiny_tokenizer, **options), datamodule=make_data())
    assert record.rates == pytest.approx([0.01 * value for value in expected])


def test_schedule_without_end_is_an_error(tiny_tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a trainer that ends"):
        make_trainer(tmp_path, max_epochs=-1).fit(
            make_module(tiny_tokenizer, schedule="cosine"), datamodule=make_data()
        )


def test_adamw_in_eight_bits(tiny_tokenizer: Any, tmp_path: Path) -> None:
    module = make_module(tiny_tokenizer, optimizer="adamw_8bit", betas=(0.8, 0.9), weight_decay=0.1)
    trainer = make_trainer(tmp_path, max_steps=2)
    trainer.fit(module, datamodule=make_data())
    group = trainer.optimizers[0].param_groups[0]
    assert type(trainer.optimizers[0]).__name__ == "AdamW8bit"
    assert (tuple(group["betas"]), group["weight_decay"]) == ((0.8, 0.9), 0.1)


def test_frozen_weights_are_not_given_to_the_optimizer(tiny_tokenizer: Any, tmp_path: Path) -> None:
    module = make_module(tiny_tokenizer)
    module.model.model.embed_tokens.requires_grad_(False)
    assert len(module.configure_optimizers().param_groups[0]["params"]) == len(list(module.model.parameters())) - 1


def test_gradient_checkpointing_changes_no_loss(tiny_tokenizer: Any, tmp_path: Path) -> None:
    losses = []
    for gradient_checkpointing in (False, True):
        record = Record()
        module = make_module(tiny_tokenizer, gradient_checkpointing=gradient_checkpointing)
        assert module.model.is_gradient_checkpointing == gradient_checkpointing
        make_trainer(tmp_path, [record], max_epochs=1).fit(module, datamodule=make_data())
        losses.append([metrics["train/loss"] for metrics in record.metrics])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


RETENTION = [
    {"source": make_examples(6), "share": 0.5},
    {"source": make_examples(6, "other"), "share": 0.5, "retention": True},
]


def test_retention_keeps_the_model_nearer_to_its_start(tiny_tokenizer: Any, tmp_path: Path) -> None:
    last = []
    for weight in (1e-9, 5.0):
        record = Record()
        module = make_module(tiny_tokenizer, retention_weight=weight)
        make_trainer(tmp_path, [record], max_epochs=6).fit(module, datamodule=make_data(train=RETENTION))
        assert record.metrics[0]["train/retention"] == pytest.approx(0, abs=1e-6)
        last.append(record.metrics[-1]["train/retention"])
    assert last[1] < 0.5 * last[0]


def test_the_start_model_is_hidden_frozen_and_never_saved(tiny_tokenizer: Any, tmp_path: Path) -> None:
    module = make_module(tiny_tokenizer, retention_weight=1.0)
    plain = make_module(tiny_tokenizer)
    assert set(module.state_dict()) == set(plain.state_dict())
    assert len(list(module.parameters())) == len(list(plain.parameters()))
    assert find_language_model(module) is module.model
    trainer = make_trainer(tmp_path, max_epochs=2)
    trainer.fit(module, datamodule=make_data(train=RETENTION))
    (start,) = module._start_model
    for name, weight in make_tiny_model().named_parameters():
        assert torch.equal(start.get_parameter(name), weight)
        assert not torch.equal(module.model.get_parameter(name), weight) or "norm" in name
    assert not start.training


def test_retention_without_marked_rows_is_an_error(tiny_tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Add `retention: true` to a source"):
        make_trainer(tmp_path, max_steps=1).fit(
            make_module(tiny_tokenizer, retention_weight=1.0), datamodule=make_data()
        )


def test_checkpoint_reads_back_without_pickle_and_loads(tiny_tokenizer: Any, tmp_path: Path) -> None:
    make_tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    module = CausalLanguageModule(tmp_path / "model", learning_rate=1e-2, schedule="cosine", betas=(0.9, 0.95))
    trainer = make_trainer(tmp_path, max_epochs=1)
    trainer.fit(module, datamodule=make_data())
    trainer.save_checkpoint(tmp_path / "fit.ckpt")
    loaded = CausalLanguageModule.load_from_checkpoint(tmp_path / "fit.ckpt", weights_only=True)
    assert loaded.hparams == module.hparams
    for name, value in module.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_logs_go_to_a_csv_logger(tiny_tokenizer: Any, tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path,
        [LearningRateMonitor()],
        logger=CSVLogger(tmp_path),
        max_epochs=2,
        log_every_n_steps=1,
    )
    trainer.fit(make_module(tiny_tokenizer), datamodule=make_data(val=make_examples(3)))
    header = (Path(trainer.log_dir) / "metrics.csv").read_text().splitlines()[0]
    assert {"train/loss", "val/loss", "val/perplexity"} <= set(header.split(","))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "cosin"}, "`schedule` expected to be one of .*Did you mean `cosine`"),
        ({"optimizer": "adam"}, "`optimizer` expected to be one of 'adamw', 'adamw_8bit' but got 'adam'"),
        ({"loss_average": "row"}, "`loss_average` expected"),
        ({"learning_rate": -1.0}, r"`learning_rate` expected to be a number in \[0, inf\)"),
        ({"learning_rate": float("nan")}, "`learning_rate` expected"),
        ({"warmup_fraction": 3}, r"`warmup_fraction` expected to be a number in \[0, 1\)"),
        ({"retention_weight": -0.1}, "`retention_weight` expected"),
    ],
)
def test_bad_arguments(tiny_tokenizer: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_module(tiny_tokenizer, **options)


def test_a_loaded_model_needs_its_tokenizer() -> None:
    with pytest.raises(TypeError, match="`tokenizer` expected to be given beside a loaded model"):
        CausalLanguageModule(make_tiny_model())
