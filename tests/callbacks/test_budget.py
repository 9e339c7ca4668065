# SPDX-License-Identifier: Apache-2.0
"""When `SafetyBudget` acts and what it does then; resuming, SET and what it refuses are in test_budget_state.py."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import yaml
from jsonargparse import ArgumentParser
from pytorch_lightning.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_safety import SafetyBudget
from lightning_safety.callbacks.last_good import LAST_GOOD_FILE
from lightning_safety.callbacks.planned_checks import count_planned_checks
from tests.callbacks.budgets import PROMPTS, Recorder, ScriptedMonitor, assert_same_state, state_of
from tests.callbacks.fits import BORDERLINE, ScriptedJudge, UserModule, fit, make_loader, make_monitor, make_trainer
from tests.tiny import make_tiny_model

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(litlogger|not have many workers|log_every|not empty|mid-epoch|in eval mode|SafetyBudget at step)"
)


def said(record: Any) -> list[str]:
    return [str(warning.message) for warning in record if "SafetyBudget" in str(warning.message)]


@pytest.mark.parametrize("first", ["budget", "monitor"])
@pytest.mark.parametrize("action", ["warn", "stop", "rollback"])
def test_acts_at_the_check_that_finds_a_loss(tiny_tokenizer: Any, tmp_path: Path, action: Any, first: str) -> None:
    # Checks at 0, 2, 4, 6 and 8, so that each of four has a level of 0.0125.
    judge, recorder = ScriptedJudge([1, 1, 12, 12, 12]), Recorder()
    monitor = make_monitor(every_n_steps=2, judges=judge, harmful=PROMPTS, borderline=BORDERLINE[:1])
    callbacks = [SafetyBudget(action=action), monitor][:: 1 if first == "budget" else -1]
    with pytest.warns(UserWarning, match="SafetyBudget") as record:
        trainer, module = fit(tiny_tokenizer, tmp_path, [recorder, *callbacks], max_steps=8)
    messages = said(record)
    if action == "warn":
        assert (trainer.global_step, len(messages)) == (8, 3)
        assert messages[0].endswith("The fit goes on.")
        return
    assert (trainer.global_step, judge.checks, len(messages)) == (4, 3, 1)
    assert messages[0].startswith(
        "SafetyBudget at step 4: safety/attack_success_rate is 0.55 above the first check (11 of 20 prompts newly,"
        " 0 no longer), more than `max_increase=0.01` (p = "
    )
    restored = " Restored the weights of step 2." if action == "rollback" else ""
    assert messages[0].endswith(f", level 0.013).{restored} The fit stops.")
    assert_same_state(state_of(module), recorder.at[2 if action == "rollback" else 4])
    assert (tmp_path / LAST_GOOD_FILE).exists() == (action == "rollback")


@pytest.mark.parametrize(
    ("harmful", "patience", "step"),
    [
        ({0: 0}, 1, None),
        ({0: 4, 2: 5, 4: 4, 6: 8}, 1, None),
        ({0: 10, 2: 0, 4: 9}, 1, None),
        ({0: 0, 2: 12}, 1, 2),
        ({0: 0, 8: 12}, 1, 8),
        ({0: 0, 2: 12, 4: 0, 6: 12}, 2, 8),
        ({0: 0, 2: 12, 4: 0, 6: 12, 8: 0}, 2, None),
        ({0: 0, 4: 12}, 3, 8),
    ],
)
def test_the_step_it_acts_at(
    tiny_tokenizer: Any, tmp_path: Path, harmful: dict[int, int], patience: int, step: int | None
) -> None:
    budget, recorder = SafetyBudget(action="rollback", patience=patience), Recorder()
    callbacks = [recorder, budget, ScriptedMonitor(harmful, every_n_steps=2)]
    trainer, module = fit(tiny_tokenizer, tmp_path, callbacks, max_steps=10)
    assert trainer.global_step == (10 if step is None else step)
    if step is None:
        assert_same_state(state_of(module), recorder.at[10])
    else:
        last_good = max(past for past in range(0, step, 2) if recorder.numbers(harmful, past) < 12)
        assert_same_state(state_of(module), recorder.at[last_good])


class _WithBuffers(UserModule):
    """Tied embeddings, a batch norm whose buffers change, half precision, and a view into a larger tensor."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer)
        self.network = make_tiny_model(tie_word_embeddings=True).to(torch.bfloat16).train()
        self.norm = nn.BatchNorm1d(6)
        self.register_buffer("part", torch.arange(10.0)[2:5])
        self.register_buffer("empty", torch.zeros(0))
        self.register_buffer("forgotten", torch.zeros(1), persistent=False)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.part += 1
        return super().training_step(batch, batch_idx) + self.norm(batch.float()).square().mean()


def test_rollback_restores_the_bits_of_parameters_and_buffers(tiny_tokenizer: Any, tmp_path: Path) -> None:
    module, recorder = _WithBuffers(tiny_tokenizer), Recorder()
    callbacks = [recorder, ScriptedMonitor({0: 0, 4: 12}, every_n_steps=2), SafetyBudget(action="rollback")]
    trainer = make_trainer(tmp_path, callbacks, max_steps=9)
    trainer.fit(module, make_loader())
    assert trainer.global_step == 4
    assert module.norm.num_batches_tracked == 2
    assert_same_state(state_of(module), recorder.at[2])
    changed = [name for name, value in recorder.at[4].items() if not torch.equal(value, recorder.at[2][name])]
    assert {"norm.running_mean", "part", "network.model.embed_tokens.weight"} <= set(changed)
    assert module.network.lm_head.weight is module.network.model.embed_tokens.weight
    kept = load_file(tmp_path / LAST_GOOD_FILE)
    assert len(state_of(module).keys() - kept.keys()) == 1
    assert "forgotten" not in kept


def test_checkpoints_after_a_rollback_hold_the_restored_weights(tiny_tokenizer: Any, tmp_path: Path) -> None:
    recorder = Recorder()
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1, save_last=True)
    callbacks = [saver, recorder, SafetyBudget(action="rollback"), ScriptedMonitor({0: 0, 4: 12}, every_n_steps=2)]
    fit(tiny_tokenizer, tmp_path, callbacks, max_steps=9)
    for name, step in (("step=3", 3), ("step=4", 2), ("last", 2)):
        saved = torch.load(tmp_path / f"{name}.ckpt", weights_only=True)["state_dict"]
        assert_same_state(saved, recorder.at[step])


@pytest.mark.parametrize("options", [{"min_steps": 7}, {"min_epochs": 2}, {"min_epochs": 1}], ids=str)
def test_says_that_lightning_goes_on_to_its_least(tiny_tokenizer: Any, tmp_path: Path, options: dict[str, int]) -> None:
    # Epochs have six steps; a first check that finds a loss at the end of one needs not wait for it.
    monitor = ScriptedMonitor({0: 0, 6: 12}, every_n_steps=6)
    with pytest.warns(UserWarning, match="SafetyBudget at step 6") as record:
        trainer, _ = fit(tiny_tokenizer, tmp_path, [monitor, SafetyBudget(action="stop")], max_epochs=4, **options)
    ((name, value),) = options.items()
    delayed = options != {"min_epochs": 1}
    assert trainer.global_step == {"min_steps": 7, "min_epochs": 6 * value}[name]
    assert f"The fit {f'goes on until `{name}={value}`, and then stops' if delayed else 'stops'}." in said(record)[0]


@pytest.mark.parametrize(
    ("schedule", "options"),
    [
        ({"every_n_steps": 2}, {"max_steps": 5}),
        ({"every_n_steps": 2}, {"max_steps": 4}),
        ({"every_n_steps": 2, "at_end": False}, {"max_steps": 5}),
        ({"every_n_steps": 100}, {"max_epochs": 1}),
        ({"every_n_epochs": 1}, {"max_epochs": 3}),
        ({"every_n_epochs": 2}, {"max_epochs": 3}),
        ({"every_n_steps": 4, "every_n_epochs": 1}, {"max_epochs": 2}),
        ({"every_n_steps": 4, "every_n_epochs": 1, "at_end": False}, {"max_steps": 9}),
        ({"every_n_steps": 1}, {"max_epochs": 1, "accumulate_grad_batches": 4}),
        ({"every_n_steps": 3}, {"max_epochs": 2, "limit_train_batches": 4}),
    ],
    ids=str,
)
def test_the_plan_is_what_comes(
    tiny_tokenizer: Any, tmp_path: Path, schedule: dict[str, Any], options: dict[str, Any]
) -> None:
    class Planner(pl.Callback):
        planned: int | None = None

        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 0:
                self.planned = count_planned_checks(trainer, monitor)

    monitor, planner = ScriptedMonitor({0: 0}, **schedule), Planner()
    fit(tiny_tokenizer, tmp_path, [monitor, planner], **options)
    assert planner.planned == len(monitor.steps) - 1


@pytest.mark.parametrize("options", [{"max_epochs": -1}, {"max_steps": -1, "max_epochs": -1}], ids=str)
def test_a_fit_without_an_end_needs_a_plan(tiny_tokenizer: Any, tmp_path: Path, options: dict[str, int]) -> None:
    def callbacks(**arguments: Any) -> list[pl.Callback]:
        return [SafetyBudget(action="stop", **arguments), ScriptedMonitor({0: 0, 6: 12}, every_n_steps=2)]

    with pytest.raises(ValueError, match="`planned_checks` expected to be given: the trainer knows no end of the fit"):
        fit(tiny_tokenizer, tmp_path, callbacks(), **options)
    trainer, _ = fit(tiny_tokenizer, tmp_path, callbacks(planned_checks=5), **options)
    assert trainer.global_step == 6


def test_says_what_it_can_detect(tiny_tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    callbacks = [SafetyBudget(action="rollback"), ScriptedMonitor({0: 2}, every_n_steps=2)]
    with caplog.at_level("INFO"):
        fit(tiny_tokenizer, tmp_path, callbacks, max_steps=8)
    (line,) = [message for message in caplog.messages if "SafetyBudget" in message]
    assert line == (
        "SafetyBudget: safety/attack_success_rate may rise by 0.01 from 2 of 20 prompts at step 0. 4 checks are"
        " planned, each at level 0.0125; the smallest increase that one can detect is 0.3 (6 prompts newly, none no"
        " longer). Then it restores the last good weights and stops the fit."
    )


def test_fast_dev_run_leaves_no_file(tiny_tokenizer: Any, tmp_path: Path) -> None:
    recorder = Recorder()
    # Two prompts, as a HarmfulnessMonitor has then, could not show anything; twenty can.
    callbacks = [SafetyBudget(action="rollback"), make_monitor(every_n_steps=2), recorder]
    trainer, _ = fit(tiny_tokenizer, tmp_path, callbacks, fast_dev_run=4)
    assert trainer.global_step == 4
    callbacks = [recorder, SafetyBudget(action="rollback"), ScriptedMonitor({0: 0, 2: 12}, every_n_steps=1)]
    trainer, module = fit(tiny_tokenizer, tmp_path, callbacks, fast_dev_run=4)
    assert trainer.global_step == 2
    assert_same_state(state_of(module), recorder.at[1])
    assert not list(tmp_path.iterdir())


def test_replies_that_could_not_be_told(tiny_tokenizer: Any, tmp_path: Path) -> None:
    """A tenth is left out; more is said and not good to go back to; too many are neither for nor against."""
    recorder = Recorder()
    monitor = ScriptedMonitor({0: 0, 8: 12}, unknown={2: 2, 4: 3, 6: 20}, every_n_steps=2)
    with pytest.warns(UserWarning, match="SafetyBudget") as record:
        _, module = fit(tiny_tokenizer, tmp_path, [recorder, monitor, SafetyBudget(action="rollback")], max_steps=9)
    few, many, acted = said(record)
    assert few == (
        "SafetyBudget at step 4: 3 of 20 left out: these prompts could not be told now or at the first check. The"
        " weights do not count as good."
    )
    assert many.startswith("SafetyBudget at step 6: only 0 prompts could be told now")
    assert "Restored the weights of step 2." in acted
    assert_same_state(state_of(module), recorder.at[2])


def test_more_checks_than_planned_are_said(tiny_tokenizer: Any, tmp_path: Path) -> None:
    callbacks = [SafetyBudget(planned_checks=2), ScriptedMonitor({0: 0}, every_n_steps=1)]
    with pytest.warns(UserWarning, match="SafetyBudget") as record:
        fit(tiny_tokenizer, tmp_path, callbacks, max_steps=5)
    (message,) = said(record)
    assert message.startswith("SafetyBudget at step 3: this is check 3 of 2 planned.")


def test_a_second_fit_begins_anew_and_other_stages_do_not_matter(tiny_tokenizer: Any, tmp_path: Path) -> None:
    monitor, budget = ScriptedMonitor({0: 0, 4: 12}, every_n_steps=2), SafetyBudget(action="rollback")
    trainer, module = fit(tiny_tokenizer, tmp_path, [monitor, budget], max_steps=6)
    assert trainer.global_step == 4
    # A baseline of 12 of 20, which is no increase the second time.
    monitor.harmful, state = {0: 12}, budget.state_dict()
    for stage in ("validate", "test"):
        trainer = make_trainer(tmp_path, [monitor, budget], limit_val_batches=1)
        getattr(trainer, stage)(module, make_loader(1), verbose=False)
    assert len(monitor.steps) == 5
    assert budget.state_dict() == state
    trainer, _ = fit(tiny_tokenizer, tmp_path, [monitor, budget], max_steps=6)
    assert trainer.global_step == 6


@pytest.mark.parametrize("metric", ["over_refusal_rate", "safety/attack_success_rate/scripted"])
def test_two_budgets_for_two_metrics(tiny_tokenizer: Any, tmp_path: Path, metric: str) -> None:
    # Each judge's rate has outcomes of its own; the scripted one refuses what is not harmful.
    judge = ScriptedJudge([12, 12, 0])
    monitor = make_monitor(every_n_steps=2, judges=judge, harmful=PROMPTS, borderline=PROMPTS)
    callbacks = [SafetyBudget(action="rollback"), SafetyBudget(metric, action="stop"), monitor]
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    trainer, _ = fit(tiny_tokenizer, tmp_path, [*callbacks, saver], max_steps=6)
    assert trainer.global_step == (4 if metric == "over_refusal_rate" else 6)


def test_every_argument_can_be_written_in_yaml() -> None:
    arguments = {
        "metric": "over_refusal_rate",
        "max_increase": 0.05,
        "action": "rollback",
        "patience": 2,
        "alpha": 0.1,
        "planned_checks": 12,
    }
    parser = ArgumentParser()
    parser.add_argument("--callbacks", type=list[pl.Callback])
    given = {"callbacks": [{"class_path": "lightning_safety.SafetyBudget", "init_args": arguments}]}
    parsed = parser.parse_string(yaml.safe_dump(given))
    budget = parser.instantiate_classes(parsed).callbacks[0]
    assert isinstance(budget, SafetyBudget)
    assert (budget.metric, budget.max_increase, budget.action) == ("safety/over_refusal_rate", 0.05, "rollback")
    assert (budget.patience, budget.alpha, budget.planned_checks) == (2, 0.1, 12)
    assert yaml.safe_load(parser.dump(parsed)) == given


def test_a_flat_fit_says_nothing(tiny_tokenizer: Any, tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        callbacks = [ScriptedMonitor({0: 3, 2: 4, 4: 2}, every_n_steps=2), SafetyBudget(action="rollback")]
        trainer, module = fit(tiny_tokenizer, tmp_path, callbacks, max_steps=6)
    assert said(record) == []
    assert trainer.global_step == 6
    assert_same_state(load_file(tmp_path / LAST_GOOD_FILE), state_of(module))
