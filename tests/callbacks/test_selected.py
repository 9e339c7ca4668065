# SPDX-License-Identifier: Apache-2.0
"""What `SafetyPreservingAdaptation` and `SafetyEnhancementTuning` share."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import lightning
import pytest
import pytorch_lightning as pl
import torch
from peft import LoraConfig, get_peft_model
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from lightning_safety.callbacks import SafetyEnhancementTuning, SafetyPreservingAdaptation, choice
from lightning_safety.callbacks.selected import SelectedWeightsCallback
from lightning_safety.language import find_language_model
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
    OwnModule,
    assert_held,
    assert_only_selected_moved,
    assert_same_bits,
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

BOTH = pytest.mark.parametrize("kind", [SafetyPreservingAdaptation, SafetyEnhancementTuning])


def assert_acted(
    kind: type[SelectedWeightsCallback], model: nn.Module, before: dict[str, Tensor], mask: SafetyMask
) -> None:
    if kind is SafetyPreservingAdaptation:
        assert_held(model, before, mask)
    else:
        assert_only_selected_moved(model, before, mask)


def halves(model: nn.Module) -> tuple[SafetyMask, SafetyMask]:
    """Two masks over all tensors without a common weight."""
    everything = mask_of_everything(model, 0.4)
    first = SafetyMask({name: index[::2] for name, index in everything.indices.items()}, everything.shapes)
    return first, everything - first


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
    examples = []

    class Counting(RefusalMargin):
        def loss(self, model: nn.Module, batch: Any) -> Tensor:
            examples.append(batch.examples)
            return super().loss(model, batch)

    monkeypatch.chdir(tmp_path)
    files = {"save_mask": "mask.safetensors"} | ({"patch": "patch.safetensors"} if kind.trains else {})
    module = OwnModule(make_tiny_model().train(), tokenizer=tiny_tokenizer)
    callback = kind(objective=Counting(), **files)
    fit(module, [callback], fast_dev_run=True)
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
    mask = mask_of_everything(module.model)
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


# Refused --------------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"fraction": 0}, ValueError, r"`fraction` expected to be in \(0, 1\] but got 0"),
        ({"fraction": 5}, ValueError, r"pass `fraction=0\.05`"),
        ({"fraction": float("nan")}, ValueError, "`fraction` expected"),
        ({"method": "topp"}, ValueError, "Did you mean `top`"),
        ({"batch_size": 0}, ValueError, "`batch_size` expected"),
        ({"mask": 0.01}, TypeError, "`mask` expected to be a SafetyMask or the path of one but got float"),
        ({"objective": RefusalMargin}, TypeError, "`objective` expected to be a SafetyObjective"),
    ],
)
def test_bad_arguments(
    kind: type[SelectedWeightsCallback], arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        kind(**arguments)


def refuse(module: OwnModule, callbacks: list[Any], message: str, error: type[Exception] = ValueError) -> None:
    """The fit ends with the error, and weights, flags and hooks are as if there had been none."""
    before, flags = weights_of(module), [weight.requires_grad for weight in module.parameters()]
    trainer = pl.Trainer(**quiet(callbacks))
    with pytest.raises(error, match=message):
        trainer.fit(module, make_loader(make_batches(2)))
    assert count_traces(module, trainer) == 0
    assert [weight.requires_grad for weight in module.parameters()] == flags
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(module).items())


@BOTH
def test_mask_of_another_model(kind: type[SelectedWeightsCallback]) -> None:
    other = mask_of_everything(make_smallest_model(hidden_size=32))
    refuse(OwnModule(make_smallest_model()), [kind(mask=other)], "expected to fit the model")


@BOTH
def test_missing_and_damaged_mask_files(kind: type[SelectedWeightsCallback], tmp_path: Path) -> None:
    refuse(OwnModule(make_smallest_model()), [kind(mask=tmp_path / "no")], "there is none", FileNotFoundError)
    mask_of_everything(make_smallest_model()).save(tmp_path / "mask")
    (tmp_path / "mask").write_bytes((tmp_path / "mask").read_bytes()[:-7])
    refuse(OwnModule(make_smallest_model()), [kind(mask=tmp_path / "mask")], "truncated")


@BOTH
def test_empty_mask(kind: type[SelectedWeightsCallback]) -> None:
    empty = SafetyMask({"lm_head.weight": torch.tensor([], dtype=torch.int32)}, {"lm_head.weight": (40, 16)})
    refuse(OwnModule(make_smallest_model(tie_word_embeddings=False)), [kind(mask=empty)], "it selects none")


@BOTH
def test_no_tokenizer(kind: type[SelectedWeightsCallback]) -> None:
    refuse(OwnModule(make_smallest_model()), [kind()], "Pass `tokenizer=`")


@BOTH
def test_tokenizer_without_chat_template(
    kind: type[SelectedWeightsCallback], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    plain = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer.backend_tokenizer, eos_token="<|im_end|>")
    refuse(OwnModule(make_tiny_model()), [kind(tokenizer=plain)], "chat template")


@BOTH
def test_loss_that_is_not_finite_while_scoring(
    kind: type[SelectedWeightsCallback], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = make_tiny_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("inf"))
    callback = kind(objective=RefusalMargin(limit=2), tokenizer=tiny_tokenizer)
    refuse(OwnModule(model), [callback], "not finite|loss of `objective` is", RuntimeError)


@BOTH
def test_all_weights_frozen(kind: type[SelectedWeightsCallback]) -> None:
    class Frozen(OwnModule):
        def configure_optimizers(self) -> Any:
            return self.make_optimizers(list(self.parameters()))

    model = make_smallest_model()
    module = Frozen(model.requires_grad_(False))
    with pytest.raises(ValueError, match=r"all are frozen .* nothing that could change"):
        fit(module, [kind(mask=mask_of_everything(model))])


@BOTH
def test_adapters_on_selected_weights(kind: type[SelectedWeightsCallback]) -> None:
    mask = mask_of_everything(make_smallest_model())
    peft_model = get_peft_model(make_smallest_model(), LoraConfig(target_modules=["v_proj"], task_type="CAUSAL_LM"))
    refuse(OwnModule(peft_model), [kind(mask=mask)], r"`model\.layers\.0\.self_attn\.v_proj\.weight` has one \(LoRA")


@BOTH
@pytest.mark.parametrize("strategy", ["ddp", "ddp_spawn"])
def test_several_processes(kind: type[SelectedWeightsCallback], strategy: str) -> None:
    callback = kind(mask=mask_of_everything(make_smallest_model()))
    trainer = pl.Trainer(**quiet([callback], strategy=strategy, devices=2))
    with pytest.raises(ValueError, match=rf"got DDPStrategy with 2 process.*{kind.__name__}.*devices=1"):
        callback.setup(trainer, OwnModule(make_smallest_model()), "fit")
    callback.setup(trainer, OwnModule(make_smallest_model()), "test")


# Together -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reverse", [False, True])
def test_overlapping_masks_of_both_are_refused_in_any_order(reverse: bool) -> None:
    first, second = halves(make_smallest_model())
    held = first | SafetyMask({n: i[:1] for n, i in second.indices.items()}, second.shapes)
    callbacks = [SafetyPreservingAdaptation(mask=held), SafetyEnhancementTuning(mask=second)]
    message = rf"SafetyEnhancementTuning and SafetyPreservingAdaptation but {len(second.indices)} are in both"
    refuse(OwnModule(make_smallest_model()), callbacks[:: -1 if reverse else 1], message)


def test_both_choosing_the_same_weights_is_refused(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    objective = RefusalMargin(limit=2)
    callbacks = [SafetyEnhancementTuning(objective=objective), SafetyPreservingAdaptation(objective=objective)]
    refuse(OwnModule(make_tiny_model(), tokenizer=tiny_tokenizer), callbacks, "are in both")


def test_disjoint_masks_give_the_same_bits_in_any_order() -> None:
    start = make_smallest_model()
    first, second = halves(start)
    modules = []
    for order in (1, -1):
        callbacks = [SafetyPreservingAdaptation(mask=first), SafetyEnhancementTuning(mask=second)]
        module = OwnModule(make_smallest_model())
        trainer = fit(module, callbacks[::order], gradient_clip_val=0.1, accumulate_grad_batches=2)
        assert_only_selected_moved(module.model, weights_of(start), second)
        assert count_traces(module.model, trainer) == 0
        modules.append(module)
    alone = OwnModule(make_smallest_model())
    fit(alone, [SafetyEnhancementTuning(mask=second)], gradient_clip_val=0.1, accumulate_grad_batches=2)
    assert_same_bits(modules[0].model, modules[1].model)
    assert_same_bits(modules[0].model, alone.model)


@pytest.mark.parametrize("reverse", [False, True])
def test_scores_do_not_depend_on_a_callback_beside(reverse: bool, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """What the second chooses must not see the hooks of the first."""
    objective = RefusalMargin(limit=2)
    alone = SafetyPreservingAdaptation(objective=objective)
    fit(OwnModule(make_tiny_model(), tokenizer=tiny_tokenizer), [alone], steps=1)
    scores = expected_safety_impact(make_tiny_model(), objective, tiny_tokenizer)
    low = select_bottom(scores, 0.01)
    beside = SafetyPreservingAdaptation(objective=objective)
    callbacks = [SafetyEnhancementTuning(mask=low), beside]
    fit(OwnModule(make_tiny_model(), tokenizer=tiny_tokenizer), callbacks[:: -1 if reverse else 1], steps=1)
    assert alone.mask == beside.mask


def test_two_that_hold() -> None:
    start = make_smallest_model()
    first, second = halves(start)
    for other in (second, first | second):
        module = OwnModule(make_smallest_model())
        fit(module, [SafetyPreservingAdaptation(mask=first), SafetyPreservingAdaptation(mask=other)])
        assert_held(module.model, weights_of(start), first | second)


def test_two_that_train_are_refused() -> None:
    callbacks = [SafetyEnhancementTuning(mask=mask) for mask in halves(make_smallest_model())]
    refuse(OwnModule(make_smallest_model()), callbacks, "expected to hold one SafetyEnhancementTuning")


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


@pytest.mark.parametrize("together", [False, True])
def test_held_fraction_is_logged_once(together: bool, tmp_path: Path) -> None:
    start = make_smallest_model()
    first, second = halves(start)
    total = sum(weight.numel() for weight in start.parameters())
    callbacks: list[Any] = [SafetyPreservingAdaptation(mask=first)]
    expected = first.count / total
    if together:
        callbacks.append(SafetyEnhancementTuning(mask=second))
        expected = 1 - second.count / total
    logger = CSVLogger(tmp_path, name="", version="")
    trainer = fit(OwnModule(make_smallest_model()), callbacks, logger=logger, log_every_n_steps=1)
    assert float(trainer.callback_metrics["safety/held_fraction"]) == pytest.approx(expected)
    with (tmp_path / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["safety/held_fraction"]]
    assert [(int(row["step"]), float(row["safety/held_fraction"])) for row in rows] == [(0, pytest.approx(expected))]


# Other shapes of trainers and modules ---------------------------------------------------------------------------------


class LightningModule(lightning.pytorch.LightningModule):
    """The same module as a user of the other Lightning package has it."""

    def __init__(self) -> None:
        super().__init__()
        self.model = make_smallest_model()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)


@BOTH
def test_trainer_of_the_lightning_package(kind: type[SelectedWeightsCallback], tmp_path: Path) -> None:
    module = LightningModule()
    before, mask = weights_of(module.model), mask_of_everything(module.model)
    trainer = lightning.pytorch.Trainer(**quiet([kind(mask=mask)]))
    trainer.fit(module, make_loader(make_batches(4)))
    assert_acted(kind, module.model, before, mask)
    assert "safety/held_fraction" in trainer.callback_metrics
    trainer.save_checkpoint(tmp_path / "fit.ckpt")
    resumed = LightningModule()
    trainer = lightning.pytorch.Trainer(**quiet([kind(mask=mask)], max_epochs=2))
    trainer.fit(resumed, make_loader(make_batches(4)), ckpt_path=tmp_path / "fit.ckpt")
    assert_acted(kind, resumed.model, before, mask)


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
