# SPDX-License-Identifier: Apache-2.0
"""Rehearsals under gradient scalers, and in half precision."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from pytorch_lightning.plugins import MixedPrecision
from torch import Tensor, nn

from tests.callbacks.test_rehearsal import STEPS, SummedLoss, assert_close, rehearsal, sgd, slow_sgd
from tests.callbacks.toys import MakeOptimizers, OwnModule, fit, make_smallest_model, weights_of
from tests.enforcement.objectives import TokenRows


class ScaledInFloat32(MixedPrecision):
    """Scales as in half precision and computes in float32, so that a power of two rounds nothing."""

    def autocast_context_manager(self) -> Any:
        return nullcontext()


@pytest.mark.parametrize("clip", [None, "norm"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_add_under_a_gradient_scaler_is_training_on_the_summed_loss(accumulate: int, clip: str | None) -> None:
    options: dict[str, Any] = {"accumulate_grad_batches": accumulate, "steps": STEPS * accumulate}
    if clip is not None:
        options |= {"gradient_clip_val": 0.5, "gradient_clip_algorithm": clip}

    def scaled() -> MixedPrecision:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
        return ScaledInFloat32("16-mixed", "cpu", scaler=scaler)

    module = OwnModule(make_smallest_model(), sgd)
    fit(module, [rehearsal()], plugins=scaled(), **options)
    reference = SummedLoss(make_smallest_model(), sgd, accumulate=accumulate)
    fit(reference, **options)
    assert_close(module.model, reference.model, weights_of(make_smallest_model()))


def adam(**options: Any) -> MakeOptimizers:
    return lambda weights: [torch.optim.AdamW(weights, lr=1e-2, eps=1e-3, **options)]


@pytest.mark.parametrize("make_optimizers", [slow_sgd, adam(), adam(fused=True)], ids=["sgd", "adamw", "fused"])
@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
def test_a_gradient_scaler_changes_no_more_than_rounding(make_optimizers: MakeOptimizers, manual: bool) -> None:
    """Where the optimizer undoes the scale itself, gradients are scaled when the callback sees them."""
    found = []
    for scale in (1.0, 2.0**10):
        module = OwnModule(make_smallest_model(), make_optimizers, manual=manual)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
        fit(module, [rehearsal()], plugins=MixedPrecision("16-mixed", "cpu", scaler=scaler), steps=STEPS)
        found.append(module)
    plain = OwnModule(make_smallest_model(), make_optimizers, manual=manual)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0, growth_interval=1000)
    fit(plain, plugins=MixedPrecision("16-mixed", "cpu", scaler=scaler), steps=STEPS)
    before = weights_of(make_smallest_model())
    assert_close(found[1].model, found[0].model, before, 2e-3)  # half precision rounds differently at another scale
    with pytest.raises(AssertionError):
        assert_close(plain.model, found[0].model, before, 2e-3)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_it_computes_in_the_precision_of_the_fit(precision: Any) -> None:
    dtypes = []

    class Seen(TokenRows):
        def loss(self, model: nn.Module, batch: Any) -> Tensor:
            dtypes.append(model(input_ids=batch.tensors["input_ids"]).logits.dtype)
            return super().loss(model, batch)

    callback = rehearsal(objective=Seen())
    fit(OwnModule(make_smallest_model(), sgd), [callback], precision=precision)
    assert set(dtypes) == {torch.bfloat16}
