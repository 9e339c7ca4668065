# SPDX-License-Identifier: Apache-2.0
"""`SafetyBudget` after a kill, beside `SafetyEnhancementTuning`, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint, StochasticWeightAveraging
from safetensors.torch import load_file, save_file

from lightning_safety.callbacks import SafetyBudget, SafetyEnhancementTuning
from lightning_safety.callbacks.last_good import CHECKPOINT_GOOD_FILE, LAST_GOOD_FILE
from lightning_safety.callbacks.monitor import Check, SafetyListener
from tests.callbacks.budgets import PROMPTS, Recorder, ScriptedMonitor, assert_same_state, state_of
from tests.callbacks.fits import UserModule, fit, make_loader, make_monitor, make_trainer
from tests.callbacks.toys import mask_of_everything
from tests.tiny import make_tiny_model

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(litlogger|not have many workers|log_every|not empty|mid-epoch|in eval mode|SafetyBudget at step|averaged"
    "|ended before the epoch|cannot continue in the middle|no state of|Found keys|not in the checkpoint)"
)


class _Kill(pl.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            raise ZeroDivisionError


# Good at 0, 2 and 4; with patience for one more, the budget acts at 8.
HARMFUL = {0: 1, 6: 12}


def make(*others: pl.Callback, **arguments: Any) -> list[pl.Callback]:
    budget = SafetyBudget(**{"action": "rollback", "patience": 2, **arguments})
    return [budget, ScriptedMonitor(HARMFUL, every_n_steps=2), *others]


def killed_fit(tokenizer: Any, folder: Path, step: int) -> Recorder:
    """Fit until a kill, with a checkpoint of each step."""
    recorder, saver = Recorder(), ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    with pytest.raises(ZeroDivisionError):
        fit(tokenizer, folder, [recorder, *make(saver, _Kill(step))], max_steps=12)
    return recorder


@pytest.mark.parametrize("same_folder", [True, False])
@pytest.mark.parametrize(("killed", "saved", "good"), [(5, 3, 2), (5, 4, 4), (7, 6, 4), (7, 3, 2)])
def test_a_resumed_fit_decides_as_an_uninterrupted_one(
    tiny_tokenizer: Any, tmp_path: Path, killed: int, saved: int, good: int, same_folder: bool
) -> None:
    whole, _ = fit(tiny_tokenizer, tmp_path / "whole", make(), max_steps=12)
    assert whole.global_step == 8
    before = killed_fit(tiny_tokenizer, tmp_path / "first", killed)
    checkpoint = tmp_path / "first" / f"step={saved}.ckpt"
    states = torch.load(checkpoint, weights_only=True)["callbacks"]
    assert [states[key]["last_good"]["step"] for key in states if key.startswith("SafetyBudget")] == [good]
    second = tmp_path / ("first" if same_folder else "second")
    recorder = Recorder()
    trainer, module = fit(tiny_tokenizer, second, [recorder, *make()], max_steps=12, ckpt_path=checkpoint)
    # The checks of the second process are compared with the first one's baseline.
    assert trainer.global_step == 8
    assert_same_state(state_of(module), (recorder.at if 4 in recorder.at else before.at)[4])
    assert any((folder / LAST_GOOD_FILE).exists() for folder in (second, tmp_path / "first"))


@pytest.mark.parametrize("spoil", ["remove", "replace"])
def test_last_good_weights_that_are_gone(tiny_tokenizer: Any, tmp_path: Path, spoil: str) -> None:
    before = killed_fit(tiny_tokenizer, tmp_path, 5)
    for name in (LAST_GOOD_FILE, CHECKPOINT_GOOD_FILE):
        if spoil == "remove":
            (tmp_path / name).unlink()
        else:
            save_file({key: value + 1 for key, value in load_file(tmp_path / name).items()}, tmp_path / name)
    found = "there is none" if spoil == "remove" else "it holds others or was damaged"
    with pytest.raises(ValueError, match=rf"of the checkpoint, of step 2, but {found}\. .* pass another `action`"):
        fit(tiny_tokenizer, tmp_path, make(), max_steps=12, ckpt_path=tmp_path / "step=3.ckpt")
    # A checkpoint saved after the check holds them itself; without rollback they are not needed.
    trainer, module = fit(tiny_tokenizer, tmp_path, make(), max_steps=12, ckpt_path=tmp_path / "step=4.ckpt")
    assert trainer.global_step == 8
    assert_same_state(state_of(module), before.at[4])
    options: dict[str, Any] = {"max_steps": 12, "ckpt_path": tmp_path / "step=3.ckpt"}
    trainer, _ = fit(tiny_tokenizer, tmp_path, make(action="stop"), **options)
    assert trainer.global_step == 8


def test_weights_that_someone_replaces_during_a_fit_are_not_restored(tiny_tokenizer: Any, tmp_path: Path) -> None:
    class Meddler(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 7:
                (tmp_path / LAST_GOOD_FILE).write_bytes(b"something else")

    with pytest.raises(ValueError, match=r"of step 4, but it holds others or was damaged\. Nothing was restored"):
        fit(tiny_tokenizer, tmp_path, make(Meddler()), max_steps=12)


def test_resumed_without_a_state_or_with_another_actions(tiny_tokenizer: Any, tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3, save_top_k=-1)
    fit(tiny_tokenizer, tmp_path, [ScriptedMonitor({0: 0}, every_n_steps=2), saver], max_steps=3)
    with pytest.raises(
        ValueError, match=r"`ckpt_path` expected to be a checkpoint that knows .* no state of SafetyBudget"
    ):
        fit(tiny_tokenizer, tmp_path, make(), max_steps=12, ckpt_path=tmp_path / "step=3.ckpt")
    saver = ModelCheckpoint(tmp_path / "stop", "{step}", every_n_train_steps=3, save_top_k=-1)
    fit(tiny_tokenizer, tmp_path, make(saver, action="stop"), max_steps=3)
    with pytest.raises(ValueError, match="names its last good weights but it names none"):
        fit(tiny_tokenizer, tmp_path, make(), max_steps=12, ckpt_path=tmp_path / "stop" / "step=3.ckpt")


def test_a_checkpoint_saved_by_a_listener_does_not_count_its_check_twice(tiny_tokenizer: Any, tmp_path: Path) -> None:
    class Saver(pl.Callback, SafetyListener):
        def on_safety_check(self, trainer: pl.Trainer, pl_module: Any, stage: str, check: Check) -> None:
            trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    with pytest.raises(ZeroDivisionError):
        fit(tiny_tokenizer, tmp_path, make(Saver(), _Kill(7)), max_steps=12)
    trainer, _ = fit(tiny_tokenizer, tmp_path, make(), max_steps=12, ckpt_path=tmp_path / "6.ckpt")
    assert trainer.global_step == 8


class _StopsLearning(pl.Callback):
    """From a step on the learning rate is 0, so that weights which are stepped stay where they are."""

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step >= 6:
            for group in trainer.optimizers[0].param_groups:
                group["lr"] = 0.0


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("options", [{}, {"min_steps": 8}], ids=str)
def test_set_goes_on_from_the_restored_weights(
    tiny_tokenizer: Any, tmp_path: Path, options: dict[str, int], tied: bool
) -> None:
    """Its optimizers hold the selected weights too, and its patch is what the fit changed."""

    def make_model() -> Any:
        return make_tiny_model(tie_word_embeddings=tied).train()

    recorder, module = Recorder(), UserModule(tiny_tokenizer)
    module.network = make_model()
    tuning = SafetyEnhancementTuning(mask=mask_of_everything(make_model()))
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    callbacks = [recorder, tuning, *make(saver, _StopsLearning(), patience=1)]
    trainer = make_trainer(tmp_path, callbacks, max_steps=12, **options)
    trainer.fit(module, make_loader())
    # The budget acts at 6, and again at 8 if the fit goes on: the script still says so.
    assert trainer.global_step == options.get("min_steps", 6)
    good = recorder.at[4]
    assert any(not torch.equal(value, recorder.at[6][name]) for name, value in good.items())
    assert_same_state(state_of(module), good)
    if options:
        assert_same_state(recorder.at[7], good)
    saved = torch.load(tmp_path / f"step={trainer.global_step}.ckpt", weights_only=True)["state_dict"]
    assert_same_state(saved, good)
    assert tuning.patch is not None
    fresh = make_model()
    tuning.patch.apply(fresh)
    assert_same_state(state_of(fresh), {name.removeprefix("network."): value for name, value in good.items()})


def test_the_mean_of_set_does_not_bring_back_what_was_rolled_back(tiny_tokenizer: Any, tmp_path: Path) -> None:
    recorder, module = Recorder(), UserModule(tiny_tokenizer)
    tuning = SafetyEnhancementTuning(mask=mask_of_everything(module.network), average_last=10)
    trainer, module = fit(tiny_tokenizer, tmp_path, [recorder, *make(patience=1), tuning], max_steps=12)
    assert trainer.global_step == 6
    assert_same_state(state_of(module), recorder.at[4])


BAD: list[tuple[dict[str, Any], str]] = [
    (
        {"max_increase": 5},
        r"`max_increase` expected to be in \[0, 1\) but got 5. For 5 points, pass `max_increase=0.05`",
    ),
    ({"max_increase": -0.1}, r"`max_increase` expected to be in \[0, 1\) but got -0.1. For 1 point"),
    ({"max_increase": "1 %"}, "`max_increase` expected to be a number"),
    ({"action": "rolback"}, "'rollback' but got 'rolback'. Did you mean `rollback`?"),
    ({"patience": 0}, "`patience` expected to be at least 1 but got 0"),
    ({"alpha": 5}, r"`alpha` expected to be in \(0, 1\) but got 5. For 5 %, pass `alpha=0.05`"),
    ({"alpha": 0}, r"`alpha` expected to be in \(0, 1\) but got 0. For 5 %"),
    ({"alpha": True}, "`alpha` expected to be a number"),
    ({"planned_checks": 0}, "`planned_checks` expected to be at least 1"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=str)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        SafetyBudget(**arguments)


def scripted(**options: Any) -> ScriptedMonitor:
    return ScriptedMonitor({0: 0}, **{"every_n_steps": 2, **options})


REFUSED: list[tuple[list[Any], str]] = [
    ([], "`callbacks` expected to hold a monitor that measures safety/attack_success_rate but there is none"),
    ([scripted(metric="toxicity")], r"got 'safety/attack_success_rate'\. Measured were safety/toxicity\. Choose from"),
    ([scripted(metric="attack_succes_rate")], r"Did you mean `safety/attack_succes_rate`\?"),
    ([scripted(at_start=False)], "`at_start` of ScriptedMonitor expected to be True but it is False"),
    ([make_monitor(generate=False)], "and HarmfulnessMonitor measures nothing so"),
    ([make_monitor(harmful=PROMPTS[:4])], r"it is on 4\. .* 5 would do"),
    ([scripted(prompts=5)], r"it is on 5\. 3 checks are planned, each at level 0\.0167\. 6 would do"),
    ([ScriptedMonitor({0: 17})], r"it is on 20, of which it counts 17 already\. 1 check is planned, .* 5 would do"),
    ([scripted(every_n_steps=None, at_end=False)], "ScriptedMonitor expected to check after the first step"),
    ([scripted(), make_monitor()], "expected to be that of one monitor but 2 measure safety/attack_success_rate"),
    ([scripted(), StochasticWeightAveraging(1e-3)], "StochasticWeightAveraging replaces them by its mean"),
    (
        [scripted(), SafetyBudget("over_refusal_rate", action="rollback")],
        "expected to hold one SafetyBudget that rolls",
    ),
]


@pytest.mark.parametrize(("others", "message"), REFUSED, ids=[message[:50] for _, message in REFUSED])
@pytest.mark.parametrize("first", [True, False])
def test_refused_before_the_first_step(
    tiny_tokenizer: Any, tmp_path: Path, others: list[Any], message: str, first: bool
) -> None:
    class Stepped(pl.Callback):
        def on_before_optimizer_step(self, *_: Any) -> None:
            raise AssertionError("a step was made")

    budget = SafetyBudget(action="rollback")
    callbacks = [budget, *others] if first else [*others, budget]
    with pytest.raises(ValueError, match=message):
        fit(tiny_tokenizer, tmp_path, [*callbacks, Stepped()], max_steps=5)
