# SPDX-License-Identifier: Apache-2.0
"""SET equals dense training in which only the selected weights keep their gradient and their new value."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

from lightning_safety.callbacks import SafetyEnhancementTuning
from lightning_safety.language import named_weights
from lightning_safety.scoring import SafetyMask
from tests.callbacks.test_held_matrix import precision_options
from tests.callbacks.toys import (
    MakeOptimizers,
    OwnModule,
    adamw,
    assert_only_selected_moved,
    assert_same_bits,
    fit,
    make_smallest_model,
    mask_of_everything,
    weights_of,
)
from tests.enforcement.toys import Lion

OPTIMIZERS: dict[str, MakeOptimizers] = {
    "adamw": adamw,
    "adamw-fused": lambda weights: [torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.1, fused=True)],
    "sgd": lambda weights: [torch.optim.SGD(weights, lr=0.1, momentum=0.9, weight_decay=0.1)],
    "lion": lambda weights: [Lion(weights)],
}


def make_model(**overrides: Any) -> nn.Module:
    """Tensors of whole vectors, as real models have them: CPU kernels round the rest of others differently."""
    return make_smallest_model(hidden_size=64, **overrides)


class DenseMasked(OwnModule):
    """The reference, with nothing of the package in it: all weights in the optimizer, and a 0/1 mask for each."""

    def __init__(self, model: nn.Module, make_optimizers: MakeOptimizers, mask: SafetyMask, **options: Any) -> None:
        super().__init__(model, make_optimizers, **options)
        self.selected: dict[nn.Parameter, Tensor] = {}
        for name, weight in named_weights(model).items():
            places = torch.zeros(weight.numel(), dtype=torch.bool)
            places[mask.indices[name].long()] = True
            self.selected[weight] = places.view_as(weight)

    def configure_optimizers(self) -> Any:
        optimizers = super().configure_optimizers()
        start = {weight: weight.detach().clone() for weight in self.selected}

        @torch.no_grad()
        def put_back(*_: Any) -> None:
            for weight, places in self.selected.items():
                weight.copy_(torch.where(places, weight, start[weight]))

        for optimizer in optimizers:
            optimizer.register_step_post_hook(put_back)
        return optimizers

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        for weight, places in self.selected.items():
            if weight.grad is not None:
                weight.grad = torch.where(places, weight.grad, torch.zeros_like(weight.grad))


def train_both(
    build: Callable[[], nn.Module], make_optimizers: MakeOptimizers = adamw, *, steps: int = 12, **options: Any
) -> tuple[nn.Module, nn.Module, SafetyMask]:
    """Return the model trained by SET, the one trained densely, and the mask."""
    mask = mask_of_everything(build())
    dense = DenseMasked(build(), make_optimizers, mask)
    fit(dense, steps=steps, **{**options, **_fresh(options)})
    compact = OwnModule(build(), make_optimizers)
    fit(compact, [SafetyEnhancementTuning(mask=mask)], steps=steps, **{**options, **_fresh(options)})
    return compact.model, dense.model, mask


def _fresh(options: dict[str, Any]) -> dict[str, Any]:
    """A precision plugin serves one trainer."""
    return precision_options("16-mixed") if "plugins" in options else {}


def refused(name: str, precision: str, clip: str | None) -> bool:
    """Lightning refuses to clip for optimizers that unscale gradients themselves; see test_held_matrix.py."""
    return name == "adamw-fused" and precision in ("bf16-mixed", "16-mixed") and clip is not None


EXACT = [
    pytest.param(*cell, id="-".join(map(str, cell)))
    for cell in itertools.product(OPTIMIZERS, ("32-true", "bf16-mixed", "bf16-true"), (1, 3), (None, "value"))
    if not refused(cell[0], cell[1], cell[3])
]
CLOSE = [
    pytest.param(*cell, id="-".join(map(str, cell)))
    for cell in itertools.product(OPTIMIZERS, ("32-true", "bf16-mixed", "16-mixed"), (None, "norm"))
    if not refused(*cell)
]


@pytest.mark.parametrize(("name", "precision", "accumulate", "clip"), EXACT)
def test_bit_for_bit(name: str, precision: str, accumulate: int, clip: str | None) -> None:
    options: dict[str, Any] = {"precision": precision, "accumulate_grad_batches": accumulate}
    if clip is not None:
        options |= {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": clip}
    model, dense, mask = train_both(make_model, OPTIMIZERS[name], **options)
    assert_same_bits(model, dense)
    if precision != "bf16-true":
        assert_only_selected_moved(model, weights_of(make_model()), mask)


@pytest.mark.parametrize(("name", "precision", "clip"), CLOSE)
def test_norm_clip_and_scaler_agree_closely(name: str, precision: str, clip: str | None) -> None:
    """The norm of the same numbers is added up in another order.

    In mixed precision the forward pass rounds weights to 16 bits: a last bit of difference may grow from step to step.
    """
    options: dict[str, Any] = precision_options(precision) | {"steps": 12 if precision == "32-true" else 2}
    if clip is not None:
        options |= {"gradient_clip_val": 0.05, "gradient_clip_algorithm": clip}
    model, dense, mask = train_both(make_model, OPTIMIZERS[name], **options)
    start = weights_of(make_model())
    largest = max(float((weight.detach() - start[key]).abs().max()) for key, weight in named_weights(dense).items())
    for left, right in zip(model.parameters(), dense.parameters(), strict=True):
        rounding = torch.finfo(torch.float32).eps * right.detach().abs()
        assert ((left - right).detach().abs() <= 1e-6 * largest + rounding).all()
    assert_only_selected_moved(model, start, mask)


def make_untied() -> nn.Module:
    return make_model(tie_word_embeddings=False)


def make_mixtral() -> nn.Module:
    config = MixtralConfig(
        vocab_size=40,
        hidden_size=64,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
        num_experts_per_tok=1,
        max_position_embeddings=16,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MixtralForCausalLM(config).train()


def make_checkpointing(use_reentrant: bool) -> nn.Module:
    model = make_model()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    return model


def make_compiled() -> nn.Module:
    model = make_model()
    model.forward = torch.compile(model.forward, backend="aot_eager")
    return model


@pytest.mark.parametrize(
    "build",
    [
        make_untied,
        make_mixtral,
        lambda: make_checkpointing(True),
        lambda: make_checkpointing(False),
        make_compiled,
    ],
    ids=["untied", "mixture-of-experts", "checkpointing-reentrant", "checkpointing", "compiled"],
)
def test_models(build: Callable[[], nn.Module]) -> None:
    model, dense, mask = train_both(build, steps=4)
    assert_same_bits(model, dense)
    assert_only_selected_moved(model, weights_of(build()), mask)


def test_groups_and_schedules() -> None:
    def two_groups(weights: list[nn.Parameter]) -> list[torch.optim.Optimizer]:
        vectors = [weight for weight in weights if weight.dim() == 1]
        matrices = [weight for weight in weights if weight.dim() == 2]
        groups = [{"params": vectors, "weight_decay": 0.0, "lr": 3e-2}, {"params": matrices}]
        return [torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1)]

    class Scheduled(OwnModule):
        def configure_optimizers(self) -> Any:
            return _with_schedule(super().configure_optimizers())

    class ScheduledDense(DenseMasked):
        def configure_optimizers(self) -> Any:
            return _with_schedule(super().configure_optimizers())

    mask = mask_of_everything(make_model())
    dense = ScheduledDense(make_model(), two_groups, mask)
    fit(dense, steps=8)
    compact = Scheduled(make_model(), two_groups)
    trainer = fit(compact, [SafetyEnhancementTuning(mask=mask)], steps=8)
    assert_same_bits(compact.model, dense.model)
    assert [group["lr"] for group in trainer.optimizers[0].param_groups] == [3e-2 / 2**8, 1e-2 / 2**8]


def _with_schedule(optimizers: list[torch.optim.Optimizer]) -> dict[str, Any]:
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizers[0], 0.5)
    return {"optimizer": optimizers[0], "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
