# SPDX-License-Identifier: Apache-2.0
"""`SafetyRehearsal` in a fit: the steps it takes are those of the summed loss, in every way Lightning makes a step."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor, nn

from lightning_safety.callbacks import SafetyPreservingAdaptation, SafetyRehearsal
from lightning_safety.scoring import RefusalLikelihood
from tests.callbacks.toys import (
    MakeOptimizers,
    OwnModule,
    assert_held,
    assert_same_bits,
    fit,
    make_batches,
    make_loader,
    make_smallest_model,
    mask_of_everything,
    quiet,
    weights_of,
)
from tests.enforcement.objectives import Broken, Elsewhere, Opposed, TokenRows
from tests.tiny import make_tiny_tokenizer

TOKENIZER = make_tiny_tokenizer()
STEPS = 6
WEIGHT = 0.5


def sgd(weights: list[nn.Parameter]) -> list[torch.optim.Optimizer]:
    return [torch.optim.SGD(weights, lr=0.2, momentum=0.9)]


def slow_sgd(weights: list[nn.Parameter]) -> list[torch.optim.Optimizer]:
    return [torch.optim.SGD(weights, lr=0.02, momentum=0.9)]


def rehearsal(**options: Any) -> SafetyRehearsal:
    return SafetyRehearsal(
        **{"every": 2, "objective": TokenRows(), "weight": WEIGHT, "batch_size": 1, "tokenizer": TOKENIZER, **options}
    )


class SummedLoss(OwnModule):
    """Trains on the task's loss plus the safety loss, written out, on the rows that the callback takes."""

    def __init__(self, model: nn.Module, make_optimizers: MakeOptimizers, *, every: int = 2, **options: Any) -> None:
        super().__init__(model, make_optimizers, **options)
        self.every = every
        reference = rehearsal()
        reference.rehearsal.prepare(model, TOKENIZER)
        self.rotation = reference.rehearsal._rotation

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.model(input_ids=batch, labels=batch, use_cache=False).loss
        step, place = divmod(batch_idx, self.accumulate)
        if place == 0 and step % self.every == 0:
            # Lightning divides by the number of batches that accumulate.
            loss = loss + self.accumulate * WEIGHT * TokenRows().loss(self.model, self.rotation[step // self.every])
        return loss


def assert_close(model: nn.Module, other: nn.Module, before: dict[str, Tensor], limit: float = 1e-6) -> None:
    """Weights differ by at most `limit` of the largest update."""
    weights = dict(model.named_parameters())
    largest = max(float((weight - before[name]).abs().max()) for name, weight in other.named_parameters())
    assert largest > 1e-2
    for name, weight in other.named_parameters():
        assert float((weights[name] - weight).abs().max()) <= limit * largest, name


@pytest.mark.parametrize("clip", [None, "norm", "value"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_add_is_training_on_the_summed_loss(accumulate: int, clip: str | None) -> None:
    options: dict[str, Any] = {"accumulate_grad_batches": accumulate, "steps": STEPS * accumulate}
    if clip is not None:
        options |= {"gradient_clip_val": 0.5 if clip == "norm" else 0.02, "gradient_clip_algorithm": clip}
    before = weights_of(make_smallest_model())
    module = OwnModule(make_smallest_model(), sgd)
    fit(module, [rehearsal()], **options)
    reference = SummedLoss(make_smallest_model(), sgd, accumulate=accumulate)
    fit(reference, **options)
    assert_close(module.model, reference.model, before)
    plain = OwnModule(make_smallest_model(), sgd)
    fit(plain, **options)
    with pytest.raises(AssertionError):
        assert_close(plain.model, reference.model, before)
    if clip is not None:
        unclipped = OwnModule(make_smallest_model(), sgd)
        fit(unclipped, [rehearsal()], accumulate_grad_batches=accumulate, steps=STEPS * accumulate)
        with pytest.raises(AssertionError):
            assert_close(unclipped.model, reference.model, before, 0.1)


class SummedLossByHand(SummedLoss):
    """Makes its steps itself."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss / self.accumulate)
        if (batch_idx + 1) % self.accumulate == 0:
            optimizer = self.optimizers()
            optimizer.step()
            optimizer.zero_grad()
        return loss


@pytest.mark.parametrize("accumulate", [1, 3])
def test_add_is_training_on_the_summed_loss_in_manual_optimization(accumulate: int) -> None:
    before = weights_of(make_smallest_model())
    module = OwnModule(make_smallest_model(), sgd, manual=True, accumulate=accumulate)
    fit(module, [rehearsal()], steps=STEPS * accumulate)
    reference = SummedLossByHand(make_smallest_model(), sgd, manual=True, accumulate=accumulate)
    fit(reference, steps=STEPS * accumulate)
    assert_close(module.model, reference.model, before)


@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
@pytest.mark.parametrize("mode", ["add", "project"])
def test_weight_zero_or_no_conflict_changes_no_bit(manual: bool, mode: Any) -> None:
    """With dropout: not even the random numbers are others."""
    torch.manual_seed(5)
    plain = OwnModule(make_smallest_model(attention_dropout=0.3), manual=manual)
    fit(plain)
    torch.manual_seed(5)
    module = OwnModule(make_smallest_model(attention_dropout=0.3), manual=manual)
    options: dict[str, Any] = {"weight": 0} if mode == "add" else {"weight": 1, "objective": Agreeing(module)}
    callback = rehearsal(every=1, mode=mode, **options)
    fit(module, [callback])
    assert callback.metrics["safety/rehearsal_share"] == 1
    assert_same_bits(module.model, plain.model)


class Agreeing(TokenRows):
    """Its gradient is the task's own, whatever that is: half the squared length of what is there."""

    def __init__(self, module: OwnModule) -> None:
        super().__init__()
        self.module = module
        self.kept: dict[str, Tensor] = {}
        module.on_after_backward = self.keep  # type: ignore[method-assign]

    def keep(self) -> None:
        self.kept = {name: weight.grad.clone() for name, weight in self.module.model.named_parameters()}

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return torch.stack([(weight * self.kept[name]).sum() for name, weight in model.named_parameters()]).sum()


def test_project_in_a_fit_is_the_dense_reference() -> None:
    class Projected(OwnModule):
        """Takes out by the formula, over one long vector."""

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            step = self.steps[0]
            weights = list(self.model.parameters())
            rows = rotation[step // 2]
            safety = torch.autograd.grad(Opposed().loss(self.model, rows), weights)
            if step % 2:
                return
            g, r = (torch.cat([tensor.flatten() for tensor in list_]) for list_ in ([w.grad for w in weights], safety))
            conflicts.append(bool(g @ r < 0))
            if conflicts[-1]:
                torch.nn.utils.vector_to_parameters(g - (g @ r) / (r @ r) * r, [w.grad for w in weights])

    conflicts: list[bool] = []
    callback = rehearsal(mode="project", weight=1, objective=Opposed())
    callback.rehearsal.prepare(make_smallest_model(), TOKENIZER)
    rotation = callback.rehearsal._rotation
    module, reference = OwnModule(make_smallest_model(), slow_sgd), Projected(make_smallest_model(), slow_sgd)
    fit(module, [callback], steps=16)
    fit(reference, steps=16)
    assert_close(module.model, reference.model, weights_of(make_smallest_model()))
    assert set(conflicts) == {False, True}
    assert callback.metrics["safety/rehearsal_conflicts"] == sum(conflicts) / len(conflicts)


@pytest.mark.parametrize("first", [True, False], ids=["rehearsal first", "held first"])
@pytest.mark.parametrize("mode", ["add", "project"])
def test_held_weights_stay_held_in_any_order_of_the_callbacks(first: bool, mode: Any) -> None:
    model = make_smallest_model()
    mask, before = mask_of_everything(model), weights_of(model)
    callbacks: list[pl.Callback] = [SafetyPreservingAdaptation(mask=mask), rehearsal(mode=mode, weight=1)]
    fit(OwnModule(model), callbacks[::-1] if first else callbacks, gradient_clip_val=0.1)
    assert_held(model, before, mask)
    other = make_smallest_model()
    fit(
        OwnModule(other), [SafetyPreservingAdaptation(mask=mask), rehearsal(mode=mode, weight=1)], gradient_clip_val=0.1
    )
    assert_same_bits(model, other)


def test_it_steps_with_every_optimizer_that_trains_the_language_model_and_with_no_other() -> None:
    class Two(OwnModule):
        def __init__(self, model: nn.Module) -> None:
            super().__init__(model, manual=True)
            self.head = nn.Linear(4, 4)

        def configure_optimizers(self) -> Any:
            optimizers = [torch.optim.SGD(self.head.parameters(), lr=0.1), *sgd(list(self.model.parameters()))]
            self.steps = [0, 0]
            return optimizers

    callback = rehearsal(every=2)
    fit(Two(make_smallest_model()), [callback], steps=5)
    assert callback._steps == {1: 5}
    assert callback._rehearsals == 3


def test_what_it_did_is_in_the_log(tmp_path: Path) -> None:
    """Of a fit too that is shorter than the trainer's interval of logging."""
    module = OwnModule(make_smallest_model())
    callback = rehearsal(every=3)
    trainer = fit(module, [callback], steps=7, logger=CSVLogger(tmp_path))
    (written,) = tmp_path.rglob("metrics.csv")
    *_, last = csv.DictReader(written.read_text().splitlines())
    assert {name: float(last[name]) for name in callback.metrics} == pytest.approx(callback.metrics)
    assert callback.metrics["safety/rehearsal_share"] == pytest.approx(3 / 7)
    assert callback.metrics["safety/rehearsal_seconds"] > 0
    assert callback.metrics["safety/rehearsal_loss"] > 0
    assert {name for name in trainer.callback_metrics if name.startswith("safety/")} == set(callback.metrics)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": Broken()}, r"The safety loss of Broken expected to be finite but is nan"),
        ({"objective": Broken(gradient_only=True)}, r"safety gradient of `.*` is not finite"),
        ({"objective": Elsewhere()}, r"`objective` expected to depend on weights that the optimizer trains"),
    ],
)
def test_a_step_with_a_bad_gradient_is_not_taken(options: dict[str, Any], message: str) -> None:
    module = OwnModule(make_smallest_model())
    before = make_smallest_model()
    with pytest.raises(RuntimeError, match=message):
        fit(module, [rehearsal(every=1, **options)])
    assert_same_bits(module.model, before)


def test_a_model_that_no_optimizer_trains_is_refused() -> None:
    class Head(OwnModule):
        def __init__(self, model: nn.Module) -> None:
            super().__init__(model.requires_grad_(False))
            self.head = nn.Linear(4, 4)

    with pytest.raises(ValueError, match=r"expected to be trained by an optimizer but none holds a trainable weight"):
        fit(Head(make_smallest_model()), [rehearsal()])


@pytest.mark.parametrize("every", [0, -1, 2.0, True, "always", None])
def test_a_bad_interval_is_refused(every: Any) -> None:
    with pytest.raises(ValueError, match=r"`every` expected to be a whole number of at least 1 or 'adaptive' but got"):
        SafetyRehearsal(every)


def test_examples_that_are_missing_stop_the_fit_before_it_trains() -> None:
    module = OwnModule(make_smallest_model(), tokenizer=TOKENIZER)
    before = make_smallest_model()
    with pytest.raises(ValueError, match=r"split"):
        fit(module, [SafetyRehearsal(objective=RefusalLikelihood("borderline", split="score"))])
    assert_same_bits(module.model, before)


def test_another_fit_begins_anew() -> None:
    callback = rehearsal()
    fit(OwnModule(make_smallest_model()), [callback], steps=5)
    again = OwnModule(make_smallest_model())
    fit(again, [callback], steps=5)
    other = OwnModule(make_smallest_model())
    trainer = pl.Trainer(**quiet([rehearsal()]))
    trainer.fit(other, make_loader(make_batches(5)))
    assert_same_bits(again.model, other.model)
