# SPDX-License-Identifier: Apache-2.0
"""Looking at a model in the middle of a fit changes nothing of the fit, and sees what it should."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from lightning_safety.callbacks import HarmfulnessMonitor, SafetyEnhancementTuning, SafetyPreservingAdaptation
from lightning_safety.data import known_answer_tasks, load_prompts
from lightning_safety.training.studies.watching import Look, LookingOn, fit_and_look
from tests.callbacks.toys import OwnModule, assert_same_bits, fit, make_smallest_model, weights_of
from tests.tiny import make_tiny_model


def test_looks_come_after_the_steps_asked_for_and_once_each() -> None:
    seen: list[dict[str, torch.Tensor]] = []

    def look(model: nn.Module) -> dict[str, Any]:
        seen.append(weights_of(model))
        return {"number": len(seen)}

    looking = LookingOn([2, 4], look)
    module = OwnModule(make_smallest_model())
    fit(module, [looking], steps=12, accumulate_grad_batches=3)
    assert [(entry["step"], entry["number"]) for entry in looking.found] == [(2, 1), (4, 2)]
    plain = OwnModule(make_smallest_model())
    fit(plain, steps=6, accumulate_grad_batches=3)
    for name, weight in weights_of(plain.model).items():
        assert torch.equal(weight, seen[0][name])


def test_time_of_looking_is_not_time_of_training() -> None:
    def look(model: nn.Module) -> dict[str, Any]:
        time.sleep(0.5)
        return {}

    looking = LookingOn([1, 3], look)
    fit(OwnModule(make_smallest_model()), [looking], steps=3)
    first, second = (entry["training_seconds"] for entry in looking.found)
    # The first look took half a second, which is not in what came before the second.
    assert 0 < first < second < first + 0.5


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_start_weights_are_mixed_in_for_the_look_alone(share: float) -> None:
    seen: list[dict[str, torch.Tensor]] = []

    def look(model: nn.Module) -> dict[str, Any]:
        seen.append(weights_of(model))
        return {}

    module, plain = OwnModule(make_smallest_model()), OwnModule(make_smallest_model())
    fit(module, [LookingOn([2, 4], look, start_share=share)])
    fit(plain)
    assert_same_bits(module.model, plain.model)
    start, end = weights_of(make_smallest_model()), weights_of(plain.model)
    for name, weight in seen[1].items():
        torch.testing.assert_close(weight, (1 - share) * end[name] + share * start[name])


def test_a_metric_that_is_no_number_is_kept_as_none() -> None:
    class Unscored(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            pl_module.log("safety/attack_success_rate", float("nan"))
            pl_module.log("safety/update_norm", 2.0)

    looking = LookingOn([1], lambda model: {})
    fit(OwnModule(make_smallest_model()), [Unscored(), looking], steps=1)
    assert looking.found[0]["metrics"] == {"safety/attack_success_rate": None, "safety/update_norm": 2.0}


def test_a_look_judges_and_forgets(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_tiny_model()
    before = weights_of(model)
    sets = {name: load_prompts(name, split="monitor", limit=n) for name, n in (("harmful", 3), ("borderline", 2))}
    answers = load_prompts("harmless", split="monitor", limit=2)
    look = Look(tiny_tokenizer, answers=answers, tasks=known_answer_tasks(4), **sets)
    found = look(model)
    assert set(found["rates"]) == {"keyword_refusal", "refusal_classifier"}
    assert found["rates"]["keyword_refusal"]["attack_success_rate"]["total"] == 3
    assert found["rates"]["keyword_refusal"]["over_refusal_rate"]["total"] == 2
    assert found["perplexity"]["examples"] == 2
    assert found["exact_match"]["total"] == 4
    assert not any(prompt.prompt in str(found) for prompts in sets.values() for prompt in prompts)
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(model).items())


def test_a_look_says_what_it_looks_with(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = {name: load_prompts(name, split="monitor", limit=2) for name in ("harmful", "borderline", "harmless")}
    look = partial(Look, tiny_tokenizer, borderline=rows["borderline"], answers=rows["harmless"], tasks=[])
    first, other = look(harmful=rows["harmful"]).settings, look(harmful=rows["harmful"][::-1]).settings
    assert first["harmful"].startswith("2 rows, ")
    assert {name for name, value in first.items() if other[name] != value} == {"harmful"}


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (HarmfulnessMonitor(), "none that writes files but got HarmfulnessMonitor"),
        (SafetyEnhancementTuning(patch="patch.safetensors"), "got SafetyEnhancementTuning with `patch_file`"),
        (SafetyPreservingAdaptation(save_mask="mask.safetensors"), "got SafetyPreservingAdaptation with `save_mask`"),
        (pl.callbacks.ModelCheckpoint(), "got ModelCheckpoint"),
    ],
)
def test_callbacks_that_write_files_are_refused(callback: pl.Callback, message: str) -> None:
    options: dict[str, Any] = {"at": [1], "look": lambda model: {}, "precision": "32-true", "seed": 0}
    with pytest.raises(ValueError, match=message):
        fit_and_look(lambda: OwnModule(make_smallest_model()), pl.LightningDataModule(), [callback], **options)
