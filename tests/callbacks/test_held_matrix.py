# SPDX-License-Identifier: Apache-2.0
"""Held means held: bit-identical after 20 optimizer steps in every combination that Lightning and torch allow.

Each cell is one fit of a very small model with some weights of every tensor held. `UNHELD` repeats one fit of each
optimizer and precision without the callback, in which the same weights move: the cells could fail.
"""

from __future__ import annotations

import itertools
from typing import Any

import bitsandbytes
import pytest
import torch
from pytorch_lightning.plugins import MixedPrecision
from torch import nn

from lightning_safety.callbacks import SafetyPreservingAdaptation
from tests.callbacks.toys import (
    MakeOptimizers,
    OwnModule,
    adamw,
    assert_held,
    fit,
    make_smallest_model,
    mask_of_everything,
    moved,
    weights_of,
)
from tests.enforcement.toys import Lion

STEPS = 20
DECAY = 0.1


def matrices(weights: list[nn.Parameter]) -> list[nn.Parameter]:
    return [weight for weight in weights if weight.dim() == 2]


def muon(weights: list[nn.Parameter]) -> list[torch.optim.Optimizer]:
    """On matrices alone, which is all that Muon takes: the rest trains in `muon_and_adamw`."""
    return [torch.optim.Muon(matrices(weights), lr=1e-2, weight_decay=DECAY)]


def muon_and_adamw(weights: list[nn.Parameter]) -> list[torch.optim.Optimizer]:
    return [*muon(weights), *adamw([weight for weight in weights if weight.dim() != 2])]


OPTIMIZERS: dict[str, MakeOptimizers] = {
    "adamw": adamw,
    "adamw-foreach": lambda weights: [torch.optim.AdamW(weights, lr=1e-2, weight_decay=DECAY, foreach=True)],
    "adamw-fused": lambda weights: [torch.optim.AdamW(weights, lr=1e-2, weight_decay=DECAY, fused=True)],
    "sgd": lambda weights: [torch.optim.SGD(weights, lr=1e-1, momentum=0.9, weight_decay=DECAY)],
    "adafactor": lambda weights: [torch.optim.Adafactor(weights, lr=5e-2, weight_decay=DECAY)],
    "lion": lambda weights: [Lion(weights, lr=1e-2)],
    "muon": muon,
    "muon+adamw": muon_and_adamw,
    # By default it keeps tensors below 4,096 weights in 32 bits.
    "adamw8bit": lambda weights: [bitsandbytes.optim.AdamW8bit(weights, lr=1e-2, weight_decay=DECAY, min_8bit_size=16)],
}
PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", "16-mixed")
CLIPS = (None, "norm", "value")
CELLS = [
    pytest.param(*cell, id="-".join(map(str, cell)))
    for cell in itertools.product(OPTIMIZERS, PRECISIONS, (1, 3), CLIPS, ("automatic", "manual"))
]
UNHELD = [pytest.param(*cell, id="-".join(cell)) for cell in itertools.product(OPTIMIZERS, PRECISIONS)]


def refusal(name: str, precision: str, clip: str | None, optimization: str) -> tuple[type[Exception], str] | None:
    """Return the error of a cell that Lightning refuses, whatever our callback does."""
    if name == "muon+adamw" and optimization == "automatic":
        return RuntimeError, "Training with multiple optimizers is only supported with manual optimization"
    if name == "adamw-fused" and precision in ("16-mixed", "bf16-mixed") and clip is not None:
        return RuntimeError, "does not allow for gradient clipping because it performs unscaling of gradients"
    return None


def precision_options(precision: str) -> dict[str, Any]:
    """On the CPU, ``precision="16-mixed"`` alone is silently bfloat16 without a scaler."""
    if precision != "16-mixed":
        return {"precision": precision}
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=scaler)]}


def run(
    name: str, precision: str, accumulate: int, clip: str | None, optimization: str, callbacks: list[Any]
) -> OwnModule:
    manual = optimization == "manual"
    module = OwnModule(make_smallest_model(), OPTIMIZERS[name], manual=manual, accumulate=accumulate, clip=clip)
    options = precision_options(precision)
    if not manual:
        # In manual optimization Lightning refuses these, and the module does it by hand.
        options["accumulate_grad_batches"] = accumulate
        if clip is not None:
            options |= {"gradient_clip_val": 0.1, "gradient_clip_algorithm": clip}
    fit(module, callbacks, steps=STEPS * accumulate, **options)
    assert module.steps == [STEPS] * len(module.steps)
    return module


def trained(name: str, module: OwnModule) -> set[str]:
    """The tensors that the optimizers hold."""
    return {key for key, weight in module.model.named_parameters() if name != "muon" or weight.dim() == 2}


# At the end of a fit the callback puts back what has moved, and warns: that must not hide a drift.
@pytest.mark.filterwarnings("error:.*held weights")
@pytest.mark.parametrize(("name", "precision", "accumulate", "clip", "optimization"), CELLS)
def test_held(name: str, precision: str, accumulate: int, clip: str | None, optimization: str) -> None:
    start = make_smallest_model()
    mask = mask_of_everything(start)
    callback = SafetyPreservingAdaptation(mask=mask)
    error = refusal(name, precision, clip, optimization)
    if error is not None:
        with pytest.raises(error[0], match=error[1]):
            run(name, precision, accumulate, clip, optimization, [callback])
        return
    module = run(name, precision, accumulate, clip, optimization, [callback])
    assert_held(module.model, weights_of(start), mask, trained=trained(name, module))


@pytest.mark.parametrize(("name", "precision"), UNHELD)
def test_the_same_weights_move_when_nothing_holds_them(name: str, precision: str) -> None:
    start = make_smallest_model()
    mask = mask_of_everything(start)
    module = run(name, precision, 1, None, "manual", [])
    for tensor, change in moved(module.model, weights_of(start)).items():
        if tensor in trained(name, module):
            assert change[mask.indices[tensor].long()].any(), tensor


def test_eight_bit_state_has_eight_bits() -> None:
    module = OwnModule(make_smallest_model(), OPTIMIZERS["adamw8bit"])
    trainer = fit(module, [SafetyPreservingAdaptation(mask=mask_of_everything(module.model))])
    states = trainer.optimizers[0].state.values()
    assert {state["state1"].dtype for state in states} == {torch.uint8}


def test_scaler_scales() -> None:
    module = OwnModule(make_smallest_model())
    trainer = fit(module, **precision_options("16-mixed"))
    assert trainer.precision_plugin.scaler.get_scale() == 256.0
    assert type(trainer.precision_plugin).__name__ == "MixedPrecision"
