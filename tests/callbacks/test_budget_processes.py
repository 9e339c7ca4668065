# SPDX-License-Identifier: Apache-2.0
"""`SafetyBudget` under DDP: two processes decide as the first one's monitor finds, and restore the same weights."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
from pytorch_lightning.callbacks import ModelCheckpoint

from lightning_safety.callbacks import SafetyBudget
from lightning_safety.callbacks.last_good import LAST_GOOD_FILE
from lightning_safety.processes import rank
from tests.callbacks.budgets import Recorder, ScriptedMonitor, assert_same_state
from tests.callbacks.shared_fits import files_in, fit
from tests.spawned import run_in_processes

# Good at 0, 2 and 4; with patience for one more, the budget acts at 8. The second process alone would find nothing.
HARMFUL = [{0: 1, 6: 12}, {0: 0}]


class _Remove(pl.Callback):
    """Removes the last good weights before they are needed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 7 and rank() == 0:
            (self.folder / LAST_GOOD_FILE).unlink()


def _budgeted(folder: Path, *others: pl.Callback, **options: Any) -> dict[str, Any]:
    recorder, monitor = Recorder(), ScriptedMonitor(HARMFUL[rank()], every_n_steps=2)
    callbacks = [recorder, SafetyBudget(action="rollback", patience=2), monitor, *others]
    try:
        trainer, weights = fit(folder, callbacks, steps=12, **options)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {"step": trainer.global_step, "weights": weights, "at": recorder.at, "own": monitor.metrics}


def _work(folder: Path) -> dict[str, Any]:
    saver = ModelCheckpoint(folder / "saved", "{step}", every_n_train_steps=1, save_top_k=-1)
    return {
        "whole": _budgeted(folder / "whole", saver),
        "resumed": _budgeted(folder / "resumed", ckpt_path=folder / "saved" / "step=5.ckpt"),
        "removed": _budgeted(folder / "removed", _Remove(folder / "removed")),
    }


@pytest.mark.filterwarnings("ignore:.*(not have many workers|log_every)")
def test_processes_decide_alike_and_roll_back_together(tmp_path: Path) -> None:
    first, second = run_in_processes(tmp_path, partial(_work, tmp_path))
    assert isinstance(first, dict), first
    for found in (first, second):
        for name in ("whole", "resumed"):
            assert found[name]["step"] == 8, name
            assert found[name]["own"] == first[name]["own"]
            good = first["whole"]["at"][4]
            assert_same_state(found[name]["weights"], {key: good[key] for key in found[name]["weights"]})
        assert "expected to hold the last good weights, of step 4, but there is none" in found["removed"]["error"]
        assert "where every process sees it" in found["removed"]["error"]
    assert LAST_GOOD_FILE in files_in(tmp_path / "whole")
    assert LAST_GOOD_FILE not in files_in(tmp_path / "resumed")
