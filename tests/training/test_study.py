# SPDX-License-Identifier: Apache-2.0
"""What a study has made is on disk before something else can fail."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
from transformers import PreTrainedTokenizerFast

from lightning_safety import CausalLanguageModule, InstructionDataModule, SafetyEnhancementTuning
from lightning_safety.monitoring import evaluate_safety
from lightning_safety.training.study import run_study
from tests.callbacks.toys import mask_of_everything, quiet
from tests.tiny import make_tiny_model


@dataclass
class Fit:
    trainer: pl.Trainer
    model: pl.LightningModule
    datamodule: pl.LightningDataModule


def make_fit(tokenizer: PreTrainedTokenizerFast, callback: SafetyEnhancementTuning) -> Fit:
    module = CausalLanguageModule(make_tiny_model(), tokenizer=tokenizer)
    data = InstructionDataModule([{"source": "harmless", "limit": 4}], batch_size=2)
    return Fit(pl.Trainer(**quiet([callback], max_steps=2)), module, data)


@pytest.mark.parametrize("failing", [2, 3])
def test_a_failing_evaluation_loses_nothing(
    failing: int,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = 0

    def evaluate(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise RuntimeError("The judge does not answer.")
        return evaluate_safety(*arguments, **options)

    monkeypatch.setattr("lightning_safety.training.study.evaluate_safety", evaluate)
    drawn = [SafetyEnhancementTuning(method="random") for _ in range(2)]
    fits = [make_fit(tiny_tokenizer, callback) for callback in drawn]
    with pytest.raises(RuntimeError, match="does not answer"):
        run_study(fits[0], lambda: fits[1], output=tmp_path, limit=2, max_new_tokens=2)
    written = {entry.name for entry in tmp_path.iterdir()}
    assert {"mask.safetensors", "mask.png", "patch.safetensors"} <= written
    assert ("random-patch.safetensors" in written) == (failing == 3)
    assert ("results.json" in written) == (failing == 3)


def test_a_control_needs_something_that_could_be_random(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    given = SafetyEnhancementTuning(mask=mask_of_everything(make_tiny_model()))
    fit = make_fit(tiny_tokenizer, given)
    with pytest.raises(ValueError, match="`control` expected a trainer"):
        run_study(fit, lambda: fit, output=tmp_path)
