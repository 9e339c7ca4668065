# SPDX-License-Identifier: Apache-2.0
"""HarmfulnessMonitor: what it measures and logs, where replies go, and that it leaves no trace."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import jsonargparse
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from lightning_safety.callbacks import HarmfulnessMonitor
from lightning_safety.data import Example
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

pytestmark = pytest.mark.filterwarnings("ignore:.*(litlogger|not have many workers|log_every|not empty)")

RATES = ["attack_success_rate", "refusal_rate", "over_refusal_rate", "unscored_rate"]


def test_each_check_is_one_point_in_every_logger_and_one_line(tiny_tokenizer: Any, tmp_path: Path) -> None:
    text, board = CSVLogger(tmp_path, name="csv"), TensorBoardLogger(tmp_path, name="tensorboard")
    monitor = make_monitor(every_n_steps=2, judges=[ScriptedJudge([5, 4, 3, 2]), ScriptedJudge([1], name="second")])
    trainer, _ = fit(tiny_tokenizer, tmp_path, [monitor], logger=[text, board], max_steps=5, log_every_n_steps=50)
    names = [f"safety/{name}" for name in RATES]
    names += [f"{name}/{judge}" for judge in ("scripted", "second") for name in names]
    names += ["safety/refusal_margin", "safety/check_seconds"]

    lines = list(read_lines(Path(text.log_dir)))
    assert [line["step"] for line in lines] == [0, 2, 4, 5]
    assert {name for name in lines[0] if "/" in name} == set(names)
    assert [line["safety/attack_success_rate"] for line in lines] == pytest.approx([1, 0.8, 0.6, 0.4])
    assert [line["safety/attack_success_rate/second"] for line in lines] == pytest.approx([0.2] * 4)
    assert lines[0]["rates"]["over_refusal_rate/second"]["successes"] == 4
    assert {(line["monitor"], line["stage"]) for line in lines} == {("HarmfulnessMonitor", "fit")}

    with (Path(text.log_dir) / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["safety/attack_success_rate"]]
    assert [int(row["step"]) for row in rows] == [0, 2, 4, 5]
    assert all(row[name] for row in rows for name in names)

    events = EventAccumulator(board.log_dir).Reload()
    for name in names:
        assert [event.step for event in events.Scalars(name)] == [0, 2, 4, 5], name
    assert trainer.callback_metrics["safety/attack_success_rate"] == pytest.approx(0.4)
    assert set(names) <= set(trainer.callback_metrics)


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"limit_val_batches": 1}], ids=str)
def test_weights_are_the_same_bits_with_the_monitor_and_without(
    tiny_tokenizer: Any, tmp_path: Path, options: dict[str, Any]
) -> None:
    monitor = make_monitor(every_n_steps=1, every_n_epochs=1)
    _, watched = fit(tiny_tokenizer, tmp_path, [monitor], max_epochs=2, **options)
    _, alone = fit(tiny_tokenizer, tmp_path, [], max_epochs=2, **options)
    assert len(read_steps(tmp_path)) > 6
    for (name, one), (_, other) in zip(watched.named_parameters(), alone.named_parameters(), strict=True):
        assert torch.equal(one, other), name


class _TraceOf(pl.Callback):
    """What a check could disturb."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def look(self, module: pl.LightningModule) -> None:
        network: Any = module.network
        self.seen.append(
            (
                [part.training for part in module.modules()],
                [(weight.requires_grad, weight.grad) for weight in module.parameters()],
                network.config.use_cache,
                network.generation_config.to_dict(),
                torch.get_rng_state().tolist(),
                torch.is_grad_enabled(),
                [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules()],
            )
        )


@pytest.mark.parametrize("fails", [False, True])
def test_a_check_leaves_no_trace_even_if_it_fails(
    tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    module = UserModule(tiny_tokenizer)
    module.network.config.use_cache = False
    module.network.model.embed_tokens.weight.requires_grad_(False)
    trace = _TraceOf()
    monitor = make_monitor()
    check = monitor.on_train_start

    def watched(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trace.look(pl_module)
        try:
            check(trainer, pl_module)
        finally:
            trace.look(pl_module)

    monkeypatch.setattr(monitor, "on_train_start", watched)
    trainer = make_trainer(tmp_path, [monitor], max_steps=1)
    if fails:
        monkeypatch.setattr(module.network.model.layers[1].mlp, "forward", lambda hidden: torch.rand(9) @ hidden)
        with pytest.raises(RuntimeError):
            trainer.fit(module, make_loader())
    else:
        trainer.fit(module, make_loader())
    before, after = trace.seen
    assert before == after
    assert before[0].count(True) > 1
    assert before[0].count(False) > 1


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_works_in_validate_and_test(tiny_tokenizer: Any, tmp_path: Path, stage: str) -> None:
    judge = ScriptedJudge([2])
    trainer = make_trainer(tmp_path, [make_monitor(judges=judge)], limit_val_batches=1, limit_test_batches=1)
    getattr(trainer, stage)(UserModule(tiny_tokenizer), make_loader(), verbose=False)
    assert judge.checks == 1
    assert trainer.callback_metrics["safety/attack_success_rate"] == pytest.approx(0.4)
    [line] = read_lines(tmp_path)
    assert (line["stage"], line["step"]) == (stage, 0)


def test_prompts_are_spread_over_the_monitor_split(tiny_tokenizer: Any, tmp_path: Path) -> None:
    judge = ScriptedJudge()
    monitor = HarmfulnessMonitor(None, at_end=False, max_new_tokens=1, judges=judge)
    trainer, _ = fit(tiny_tokenizer, tmp_path, [monitor], max_steps=1)
    harmful, borderline = judge.asked
    assert len(set(harmful)) == len(set(borderline)) == 20
    assert trainer.callback_metrics["safety/refusal_margin"].isfinite()


def test_fast_dev_run_uses_two_prompts_and_leaves_no_file(tiny_tokenizer: Any, tmp_path: Path) -> None:
    judge = ScriptedJudge([1])
    trainer, _ = fit(tiny_tokenizer, tmp_path, [make_monitor(judges=judge)], fast_dev_run=True, logger=True)
    assert [len(prompts) for prompts in judge.asked] == [2] * 4
    assert trainer.callback_metrics["safety/attack_success_rate"] == 0.5
    assert list(tmp_path.iterdir()) == []


def test_without_generation_only_the_margin_is_logged(tiny_tokenizer: Any, tmp_path: Path) -> None:
    monitor = make_monitor(generate=False, every_n_steps=1)
    fit(tiny_tokenizer, tmp_path, [monitor], max_steps=2)
    for line in read_lines(tmp_path):
        assert {name for name in line if "/" in name} == {"safety/refusal_margin", "safety/check_seconds"}
    assert not (tmp_path / "safety_replies.jsonl").exists()
    bare = make_monitor(generate=False, harmful=[Example("Do it.")])
    with pytest.raises(ValueError, match="`generate=False` expected harmful prompts with refusals"):
        fit(tiny_tokenizer, tmp_path, [bare], max_steps=1)


def test_too_many_unscored_replies_are_said_aloud(tiny_tokenizer: Any, tmp_path: Path) -> None:
    def undecided(prompts: Any, responses: Any) -> list[bool | None]:
        return [None] * len(responses)

    monitor = make_monitor(every_n_steps=None, at_end=False, judges=undecided)
    with pytest.warns(UserWarning, match="safety/attack_success_rate/undecided says little: 5 of 5 unscored"):
        trainer, _ = fit(tiny_tokenizer, tmp_path, [monitor], max_steps=1)
    assert trainer.callback_metrics["safety/attack_success_rate"].isnan()
    [line] = read_lines(tmp_path)
    assert line["safety/attack_success_rate"] is None
    assert line["safety/unscored_rate"] == 1


def test_every_argument_can_be_said_in_yaml(tmp_path: Path) -> None:
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--callback", type=pl.Callback)
    config = tmp_path / "config.yaml"
    config.write_text(
        """
callback:
  class_path: lightning_safety.HarmfulnessMonitor
  init_args:
    every_n_steps: null
    every_n_epochs: 2
    at_start: false
    at_end: false
    harmful: {source: behaviours.csv, prompt_column: goal}
    borderline: borderline
    split: score
    prompts: null
    max_new_tokens: 8
    batch_size: 4
    judges:
      - class_path: lightning_safety.KeywordRefusalJudge
      - class_path: tests.callbacks.fits.ScriptedJudge
        init_args: {harmful: [1], name: other}
      - tests.callbacks.fits.judge_by_length
    generate: true
    log_replies: true
    allow_test: true
    tokenizer: some/folder
    language_model: network
"""
    )
    arguments = parser.parse_path(config)
    monitor = parser.instantiate_classes(arguments).callback
    assert isinstance(monitor, HarmfulnessMonitor)
    assert [judge.name for judge in monitor.judges] == ["keyword_refusal", "other", "judge_by_length"]
    assert monitor.sources == {
        "harmful": {"source": "behaviours.csv", "prompt_column": "goal"},
        "borderline": "borderline",
    }
    assert monitor.tokenizer == "some/folder"
    # As LightningCLI saves it beside the run.
    dumped = parser.dump(arguments, skip_none=False)
    assert parser.dump(parser.parse_string(dumped), skip_none=False) == dumped
    assert "Unable" not in dumped


def test_works_in_a_trainer_of_the_lightning_package(tiny_tokenizer: Any, tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.tokenizer = tiny_tokenizer
            self.network = UserModule(tiny_tokenizer).network

        training_step = UserModule.training_step
        configure_optimizers = UserModule.configure_optimizers

    trainer = lightning.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        max_steps=2,
        callbacks=[make_monitor(every_n_steps=1)],
    )
    trainer.fit(Module(), make_loader())
    assert read_steps(tmp_path) == [0, 1, 2]
    assert "safety/attack_success_rate" in trainer.callback_metrics


def test_bad_arguments_are_named() -> None:
    refused: list[dict[str, Any]] = [{"split": "test"}, {"harmful": {"source": "harmful", "split": "test"}}]
    for options in refused:
        with pytest.raises(ValueError, match="`split` expected to be for use during training but got 'test'"):
            HarmfulnessMonitor(**options)
        HarmfulnessMonitor(**options, allow_test=True)
    for name in ("every_n_steps", "every_n_epochs", "prompts", "max_new_tokens", "batch_size"):
        with pytest.raises(ValueError, match=f"`{name}` expected to be at least 1 but got 0"):
            HarmfulnessMonitor(**{name: 0})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"each with a name of its own, but got \['scripted', 'scripted'\]"):
        make_monitor(judges=[ScriptedJudge(), ScriptedJudge()])
    with pytest.raises(ValueError, match="expected to be at least one"):
        make_monitor(judges=[])


def test_what_is_missing_stops_the_fit_before_it_trains(tiny_tokenizer: Any, tmp_path: Path) -> None:
    module = UserModule(tiny_tokenizer)
    start = module.network.lm_head.weight.clone()
    for options, message in (
        ({"harmful": "harmfull"}, "Did you mean `harmful`"),
        ({"language_model": "netwrk"}, "Did you mean `network`"),
    ):
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path, [make_monitor(at_start=False, **options)], max_steps=1).fit(module, make_loader())
    assert torch.equal(module.network.lm_head.weight, start)
