# SPDX-License-Identifier: Apache-2.0
"""What only `SafetyPreservingAdaptation` does; the matrix of held weights is in test_held_matrix.py."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import LambdaCallback
from torch import Tensor

from lightning_safety.callbacks import SafetyPreservingAdaptation, SafetyRehearsal
from lightning_safety.callbacks.gradient_edits import may_be_edited
from lightning_safety.scoring import RefusalLikelihood
from tests.callbacks.toys import (
    OwnModule,
    assert_held,
    chosen,
    fit,
    make_smallest_model,
    mask_of_everything,
    quiet,
    weights_of,
)


def test_free_weights_train_as_if_held_gradients_were_zero() -> None:
    """Against a reference that shares no code: the same gradients zeroed and values put back by hand."""
    mask = mask_of_everything(make_smallest_model())

    class ByHand(OwnModule):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            self.before = weights_of(self.model)
            for name, weight in self.model.named_parameters():
                held = chosen(mask, name, weight.numel()).view_as(weight)
                weight.grad = torch.where(held, torch.zeros_like(weight.grad), weight.grad)

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            with torch.no_grad():
                for name, weight in self.model.named_parameters():
                    held = chosen(mask, name, weight.numel()).view_as(weight)
                    weight.copy_(torch.where(held, self.before[name], weight))

    by_hand, module = ByHand(make_smallest_model()), OwnModule(make_smallest_model())
    fit(by_hand, gradient_clip_val=0.05)
    fit(module, [SafetyPreservingAdaptation(mask=mask)], gradient_clip_val=0.05)
    for left, right in zip(module.parameters(), by_hand.parameters(), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("traceless", [False, True], ids=["in place", "through .data"])
def test_gradients_added_by_other_callbacks_do_not_reach_held_weights(traceless: bool) -> None:
    mask = mask_of_everything(make_smallest_model())
    norms = []

    class Adds(pl.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            for weight in pl_module.parameters():
                (weight.grad.data if traceless else weight.grad).add_(1)

    class Looks(OwnModule):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            for name, weight in self.model.named_parameters():
                norms.append(float(weight.grad.flatten()[mask.indices[name].long()].norm()))

    module = Looks(make_smallest_model())
    fit(module, [Adds(), SafetyPreservingAdaptation(mask=mask)])
    assert set(norms) == {0.0}
    assert_held(module.model, weights_of(make_smallest_model()), mask)


class Quiet(pl.Callback):
    def on_train_batch_end(self, *_: Any) -> None:
        """Long after the step."""


class AfterBackward(OwnModule):
    def on_after_backward(self) -> None:
        """May do anything."""


class OwnStep(OwnModule):
    def optimizer_step(self, *arguments: Any, **options: Any) -> None:
        """May do anything to gradients in the closure."""
        super().optimizer_step(*arguments, **options)


class BeforeStep(pl.Callback):
    def on_before_optimizer_step(self, *_: Any) -> None:
        """May do anything."""


@pytest.mark.parametrize(
    ("kind", "callbacks", "options", "expected"),
    [
        (OwnModule, [], {}, False),
        (OwnModule, [Quiet(), SafetyRehearsal(every=100, objective=RefusalLikelihood())], {}, False),
        (OwnModule, [BeforeStep()], {}, True),
        (OwnModule, [LambdaCallback(on_before_optimizer_step=lambda *_: None)], {}, True),
        (OwnModule, [LambdaCallback(on_after_backward=partial(print, "after"))], {}, True),
        (OwnModule, [LambdaCallback(on_train_end=lambda *_: None)], {}, False),
        (OwnStep, [], {}, True),
        (AfterBackward, [], {}, True),
        (OwnModule, [], {"manual": True}, True),
    ],
)
def test_where_others_may_edit_gradients(kind: Any, callbacks: Any, options: Any, expected: bool) -> None:
    trainer = pl.Trainer(**quiet(callbacks))
    assert may_be_edited(trainer, kind(make_smallest_model(), **options)) is expected


def test_optimizer_that_lightning_does_not_know_is_noticed() -> None:
    class Hidden(OwnModule):
        def __init__(self) -> None:
            super().__init__(make_smallest_model(), manual=True)
            self.hidden = torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)

        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            self.manual_backward(self.model(input_ids=batch, labels=batch).loss)
            self.hidden.step()
            self.hidden.zero_grad()

        def configure_optimizers(self) -> None:
            return None

    module = Hidden()
    mask = mask_of_everything(module.model)
    with pytest.raises(RuntimeError, match=r"held weights were changed by something other .*`configure_optimizers`"):
        fit(module, [SafetyPreservingAdaptation(mask=mask)])


def test_weights_averaged_at_the_end_are_put_back_with_a_warning() -> None:
    class Averages(pl.Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            with torch.no_grad():
                for weight in pl_module.parameters():
                    weight.add_(0.5)

    module = OwnModule(make_smallest_model())
    mask = mask_of_everything(module.model)
    with pytest.warns(UserWarning, match=rf"{mask.count} held weights were changed during the fit"):
        fit(module, [SafetyPreservingAdaptation(mask=mask), Averages()])
    assert_held(module.model, weights_of(make_smallest_model()), mask)


def test_weights_unfrozen_during_the_fit_are_held() -> None:
    class Unfreezes(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 2:
                frozen = [weight for weight in pl_module.parameters() if not weight.requires_grad]
                trainer.optimizers[0].add_param_group({"params": frozen})
                for weight in frozen:
                    weight.requires_grad_(True)

    module = OwnModule(make_smallest_model())
    module.model.model.embed_tokens.requires_grad_(False)
    mask = mask_of_everything(module.model)
    fit(module, [SafetyPreservingAdaptation(mask=mask), Unfreezes()], steps=6)
    assert_held(module.model, weights_of(make_smallest_model()), mask)
