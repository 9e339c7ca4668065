# SPDX-License-Identifier: Apache-2.0
"""What `SafetyPreservingAdaptation` and `SafetyEnhancementTuning` share."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from lightning_safety.callbacks import SafetyEnhancementTuning, SafetyPreservingAdaptation, choice
from lightning_safety.callbacks.choice import TwoPrompts
from lightning_safety.callbacks.selected import SelectedWeightsCallback
from lightning_safety.language import find_language_model
from lightning_safety.monitoring import OwnReplies
from lightning_safety.scoring import (
    RefusalLikelihood,
    RefusalMargin,
    SafetyMask,
    expected_safety_impact,
    select_bottom,
    select_random,
    select_top,
)
from tests.callbacks.toys import (
    BOTH,
    OwnModule,
    assert_acted,
    assert_held,
    assert_only_selected_moved,
    count_traces,
    fit,
    make_batches,
    make_loader,
    make_smallest_model,
    mask_of_everything,
    no_scoring,
    quiet,
    weights_of,
)
from tests.tiny import make_tiny_model

# Choosing -------------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("method", ["top", "bottom", "random"])
def test_weights_are_chosen_at_fit_start(
    kind: type[SelectedWeightsCallback], method: str, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    start = make_tiny_model()
    objective = RefusalMargin(limit=4)
    scores = expected_safety_impact(start, objective, tiny_tokenizer)
    expected = {
        "top": lambda: select_top(scores, 0.05),
        "bottom": lambda: select_bottom(scores, 0.05),
        "random": lambda: select_random(scores, 0.05, 7),
    }[method]()
    module = OwnModule(make_tiny_model().train(), tokenizer=tiny_tokenizer)
    callback = kind(fraction=0.05, objective=objective, method=method, seed=7)
    assert callback.mask is None
    fit(module, [callback])
    assert callback.mask == expected
    assert callback.mask.metadata["method"] == method
    before = weights_of(start)
    if kind is SafetyEnhancementTuning:
        assert_only_selected_moved(module.model, before, expected)
    else:
        assert_held(module.model, before, expected)


def test_patterns_restrict_what_is_scored(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    module = OwnModule(make_tiny_model().train(), tokenizer=tiny_tokenizer)
    callback = SafetyPreservingAdaptation(objective=RefusalMargin(limit=2), include="*.mlp.*", exclude=["*.1.*"])
    fit(module, [callback])
    assert callback.mask is not None
    assert list(callback.mask.shapes) == [f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up", "down")]


@BOTH
def test_mask_may_be_an_object_or_a_file(kind: type[SelectedWeightsCallback], tmp_path: Path, monkeypatch: Any) -> None:
    mask = mask_of_everything(make_smallest_model())
    mask.save(tmp_path / "mask.safetensors")
    for given in (mask, tmp_path / "mask.safetensors", str(tmp_path / "mask.safetensors")):
        module = OwnModule(make_smallest_model())
        callback = kind(mask=given)
        assert callback.mask == mask
        with no_scoring(monkeypatch):
            fit(module, [callback])
        assert_acted(kind, module.model, weights_of(make_smallest_model()), mask)


def test_scoring_leaves_no_trace(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """With dropout, the first loss is the one without the callback: random numbers and modes are as they were."""

    class Losses(pl.Callback):
        def __init__(self) -> None:
            self.seen: list[float] = []

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.seen.append(float(outputs["loss"]))

    first = []
    for callbacks in ([], [SafetyPreservingAdaptation(objective=RefusalLikelihood(limit=3))]):
        torch.manual_seed(0)
        module = OwnModule(make_tiny_model(attention_dropout=0.3).train(), tokenizer=tiny_tokenizer)
        losses = Losses()
        fit(module, [*callbacks, losses], steps=1)
        first.append(losses.seen)
    assert first[0] == first[1]


def test_mask_is_saved_at_fit_start(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    module = OwnModule(make_tiny_model().train(), tokenizer=tiny_tokenizer)
    callback = SafetyPreservingAdaptation(objective=RefusalMargin(limit=2), save_mask=tmp_path / "mask.safetensors")
    fit(module, [callback])
    saved = SafetyMask.load(tmp_path / "mask.safetensors")
    assert saved == callback.mask
    assert saved.metadata["objective"] == "RefusalMargin"


@BOTH
def test_fast_dev_run_scores_two_prompts_and_writes_nothing(
    kind: type[SelectedWeightsCallback], tmp_path: Path, monkeypatch: Any, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    prepared, examples = [], []

    class Counting(RefusalMargin):
        def prepare(self, model: nn.Module, tokenizer: Any) -> None:
            prepared.append(model)

        def loss(self, model: nn.Module, batch: Any) -> Tensor:
            examples.append(batch.examples)
            return super().loss(model, batch)

    monkeypatch.chdir(tmp_path)
    files = {"save_mask": "mask.safetensors"} | ({"patch": "patch.safetensors"} if kind.trains else {})
    module = OwnModule(make_tiny_model().train(), tokenizer=tiny_tokenizer)
    callback = kind(objective=Counting(), **files)
    fit(module, [callback], fast_dev_run=True)
    assert prepared == [find_language_model(module)]
    assert examples == [1, 1]
    assert callback.mask is not None
    assert list(tmp_path.iterdir()) == []


# Around a fit ---------------------------------------------------------------------------------------------------------


@BOTH
def test_second_fit_is_a_new_fit(
    kind: type[SelectedWeightsCallback], monkeypatch: Any, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    scored = []
    original = choice.expected_safety_impact
    monkeypatch.setattr(
        choice, "expected_safety_impact", lambda *args, **kwargs: scored.append(1) or original(*args, **kwargs)
    )
    module = OwnModule(make_tiny_model().train(), tokenizer=tiny_tokenizer)
    callback = kind(fraction=0.05, objective=RefusalMargin(limit=2))
    masks = []
    for _ in range(2):
        before = weights_of(module.model)
        trainer = fit(module, [callback])
        assert callback.mask is not None
        masks.append(callback.mask)
        if kind is SafetyEnhancementTuning:
            assert_only_selected_moved(module.model, before, callback.mask)
        else:
            assert_held(module.model, before, callback.mask)
        assert count_traces(module.model, trainer) == 0
    assert len(scored) == 2
    assert masks[0] != masks[1]


@BOTH
def test_nothing_happens_outside_a_fit(kind: type[SelectedWeightsCallback], monkeypatch: Any) -> None:
    class Evaluated(OwnModule):
        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            assert all(not weight._post_accumulate_grad_hooks for weight in self.parameters())

        test_step = predict_step = validation_step

    module = Evaluated(make_smallest_model())
    callback = kind()
    trainer = pl.Trainer(**quiet([callback]))
    with no_scoring(monkeypatch):
        trainer.validate(module, make_loader(make_batches(1)), verbose=False)
        trainer.test(module, make_loader(make_batches(1)), verbose=False)
        trainer.predict(module, make_loader(make_batches(1)))
    assert callback.mask is None
    assert callback.state_dict() == {}


class Failing(OwnModule):
    error: BaseException = RuntimeError("out of luck")

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if batch_idx == 2:
            raise self.error
        return super().training_step(batch, batch_idx)


@BOTH
@pytest.mark.parametrize(
    ("error", "arrives"),
    [(RuntimeError("out of luck"), RuntimeError), (KeyboardInterrupt(), SystemExit)],
    ids=["error", "ctrl-c"],
)
def test_no_hook_is_left_after_an_interruption(
    kind: type[SelectedWeightsCallback], error: BaseException, arrives: type[BaseException]
) -> None:
    module = Failing(make_smallest_model())
    module.error = error
    # Of some tensors only: the others are frozen where the selected weights train.
    everything = mask_of_everything(module.model)
    some = {name: index for name, index in everything.indices.items() if ".mlp." in name}
    mask = SafetyMask(some, {name: everything.shapes[name] for name in some})
    before = weights_of(module.model)
    callback = kind(mask=mask)
    trainer = pl.Trainer(**quiet([callback]))
    with pytest.raises(arrives):
        trainer.fit(module, make_loader(make_batches(4)))
    assert module.steps == [2]
    assert count_traces(module.model, trainer) == 0
    assert all(weight.requires_grad for weight in module.parameters())
    assert_acted(kind, module.model, before, mask)  # the model is complete
    again = OwnModule(module.model)
    before = weights_of(module.model)
    fit(again, [callback])
    assert_acted(kind, again.model, before, mask)


# Telling --------------------------------------------------------------------------------------------------------------


def test_one_line_at_fit_start(caplog: pytest.LogCaptureFixture, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    module = OwnModule(make_tiny_model().train(), tokenizer=tiny_tokenizer)
    with caplog.at_level("INFO"):
        fit(module, [SafetyPreservingAdaptation(fraction=0.05, objective=RefusalMargin(limit=2))])
    lines = [record.getMessage() for record in caplog.records if "SafetyPreserving" in record.getMessage()]
    assert len(lines) == 1
    assert re.fullmatch(
        r"SafetyPreservingAdaptation: holds 921 weights still, 5 % of 18,432 scored and 2\.63 % of all 34,976;"
        r" 7\.2 KiB; scored in \d+\.\d s\.",
        lines[0],
    )


# Other shapes of trainers and modules ---------------------------------------------------------------------------------


class Nested(OwnModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__(nn.ModuleDict({"student": model, "head": nn.Linear(40, 1)}))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        student = self.model["student"]
        return student(input_ids=batch, labels=batch).loss + self.model["head"](student(input_ids=batch).logits).mean()


@BOTH
@pytest.mark.parametrize("compiled", [False, True])
def test_nested_and_compiled_models(kind: type[SelectedWeightsCallback], compiled: bool) -> None:
    model = make_smallest_model()
    mask, before = mask_of_everything(model), weights_of(model)
    module = Nested(torch.compile(model, backend="eager") if compiled else model)
    trainer = pl.Trainer(**quiet([kind(mask=mask, language_model="model.student")]))
    trainer.fit(module, make_loader(make_batches(4)))
    assert_acted(kind, find_language_model(module), before, mask)


def test_two_prompts_prepare_what_the_objective_prepares() -> None:
    """A sharded model is refused for what an objective does to it, not for the wrapper that shortens a trial run."""
    assert not TwoPrompts(RefusalMargin()).prepares
    assert TwoPrompts(OwnReplies()).prepares
