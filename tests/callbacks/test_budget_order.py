# SPDX-License-Identifier: Apache-2.0
"""`SafetyBudget` acts once every monitor has looked at the step, and before a checkpoint is saved of it."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_safety.callbacks import ActivationOverlapMonitor, SafetyBudget
from lightning_safety.callbacks.monitor import Check, SafetyListener, SafetyMonitor
from tests.callbacks.budgets import Recorder, ScriptedMonitor, assert_same_state, state_of
from tests.callbacks.fits import BORDERLINE, HARMFUL, UserModule, fit, make_trainer, read_lines
from tests.tiny import make_tiny_model

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(litlogger|not have many workers|log_every|not empty|mid-epoch|in eval mode|SafetyBudget at step"
    "|ended before the epoch|cannot continue in the middle)"
)


class NormMonitor(SafetyMonitor):
    """Logs the norm of the weights."""

    def __init__(self, every_n_steps: int | None = 2, every_n_epochs: int | None = None, at_end: bool = True) -> None:
        super().__init__(every_n_steps, every_n_epochs, True, at_end)

    def measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Check:
        return Check({"norm": norm(state_of(pl_module))})


def norm(state: dict[str, Tensor]) -> float:
    return float(sum(value.double().square().sum() for value in state.values()))


@pytest.mark.parametrize(
    "order",
    [" ".join(names) for names in permutations(("budget", "scripted", "norm"))],
)
def test_all_monitors_log_the_weights_of_the_step(tiny_tokenizer: Any, tmp_path: Path, order: str) -> None:
    recorder = Recorder()
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    named = {
        "budget": SafetyBudget(action="rollback"),
        "scripted": ScriptedMonitor({0: 0, 4: 12}, every_n_steps=2),
        "norm": NormMonitor(),
    }
    callbacks = [saver, recorder, *(named[name] for name in order.split())]
    trainer, module = fit(tiny_tokenizer, tmp_path, callbacks, max_steps=9)
    assert trainer.global_step == 4
    logged = {line["step"]: line["safety/norm"] for line in read_lines(tmp_path) if "safety/norm" in line}
    assert logged == {step: norm(recorder.at[step]) for step in (0, 2, 4)}
    assert len(set(logged.values())) == 3
    assert float(trainer.callback_metrics["safety/norm"]) == pytest.approx(logged[4])
    assert_same_state(state_of(module), recorder.at[2])
    saved = torch.load(tmp_path / "step=4.ckpt", weights_only=True)["state_dict"]
    assert_same_state(saved, recorder.at[2])


def test_a_real_monitor_sees_the_same_before_and_after_the_budgets_own(tiny_tokenizer: Any, tmp_path: Path) -> None:
    found = []
    for first in (True, False):
        activations = ActivationOverlapMonitor(2, harmful=HARMFUL, harmless=BORDERLINE, layers=[1, 2], figures=False)
        monitors = [ScriptedMonitor({0: 0, 4: 12}, every_n_steps=2), activations][:: 1 if first else -1]
        folder = tmp_path / str(first)
        fit(tiny_tokenizer, folder, [SafetyBudget(action="rollback"), *monitors], max_steps=9)
        name = "safety/refusal_direction_cosine"
        found.append({line["step"]: line[name] for line in read_lines(folder) if name in line})
    assert found[0] == found[1]
    assert found[0][4] != found[0][2]


@pytest.mark.parametrize("first", ["scripted", "norm"])
def test_where_the_last_batch_is_not_known(tiny_tokenizer: Any, tmp_path: Path, first: str) -> None:
    """Monitors then look in ``on_train_epoch_end``, the budget acts there, and checkpoints of epochs come after."""

    class Rows(torch.utils.data.IterableDataset[Tensor]):
        def __iter__(self) -> Any:
            return iter(torch.arange(4 * 12).view(8, 6).add(3))

    class Epochs(Recorder):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            assert norm(state_of(pl_module)) == norm(self.at[trainer.global_step])

    class Unknown(UserModule):
        def training_step(self, dataloader_iter: Any) -> Tensor:  # type: ignore[override]
            batch, _, _ = next(dataloader_iter)
            loss: Tensor = self.network(input_ids=batch, labels=batch, use_cache=False).loss
            return loss

    recorder, saver = Epochs(), ModelCheckpoint(tmp_path, "{step}", save_on_train_epoch_end=True, save_top_k=-1)
    scripted = ScriptedMonitor({0: 0, 8: 12}, every_n_epochs=1, at_end=False)
    monitors = [scripted, NormMonitor(None, 1, at_end=False)][:: 1 if first == "scripted" else -1]
    budget = SafetyBudget(action="rollback", planned_checks=4)
    trainer = make_trainer(tmp_path, [recorder, saver, budget, *monitors], max_epochs=4)
    module = Unknown(tiny_tokenizer)
    module.network = make_tiny_model(tie_word_embeddings=False).train()
    trainer.fit(module, torch.utils.data.DataLoader(Rows(), batch_size=2))
    assert trainer.global_step == 8
    logged = {line["step"]: line["safety/norm"] for line in read_lines(tmp_path) if "safety/norm" in line}
    assert logged == {step: norm(recorder.at[step]) for step in (0, 4, 8)}
    assert_same_state(state_of(module), recorder.at[4])
    assert_same_state(torch.load(tmp_path / "step=8.ckpt", weights_only=True)["state_dict"], recorder.at[4])


@pytest.mark.parametrize("action", ["stop", "rollback"])
def test_a_checkpoint_saved_between_decision_and_act_is_acted_on(
    tiny_tokenizer: Any, tmp_path: Path, action: Any
) -> None:
    class Saver(pl.Callback, SafetyListener):
        def on_safety_check(self, trainer: pl.Trainer, pl_module: Any, stage: str, check: Check) -> None:
            trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    def make(*others: pl.Callback) -> list[pl.Callback]:
        budget = SafetyBudget(action=action)
        return [recorder, budget, ScriptedMonitor({0: 0, 4: 12}, every_n_steps=2), NormMonitor(), *others]

    recorder = Recorder()
    fit(tiny_tokenizer, tmp_path, make(Saver()), max_steps=9)
    drifted, good = recorder.at[4], recorder.at[2]
    assert_same_state(torch.load(tmp_path / "4.ckpt", weights_only=True)["state_dict"], drifted)
    with pytest.warns(UserWarning, match="SafetyBudget at step 4: .* The fit stops"):
        trainer, module = fit(tiny_tokenizer, tmp_path, make(), max_steps=9, ckpt_path=tmp_path / "4.ckpt")
    assert trainer.global_step == 4
    assert_same_state(state_of(module), good if action == "rollback" else drifted)
