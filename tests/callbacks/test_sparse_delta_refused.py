# SPDX-License-Identifier: Apache-2.0
"""Fits of `SafetyEnhancementTuning` beside a base that are refused, interrupted, or do not do what they seem to."""

from __future__ import annotations

from typing import Any

import bitsandbytes
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_safety.callbacks import SafetyEnhancementTuning
from lightning_safety.scoring import SafetyMask
from lightning_safety.training import CausalLanguageModule
from tests.callbacks.bases import BasedModule, logits_of, make_base, make_dense, mask_of, packed
from tests.callbacks.toys import OwnModule, fit, make_batches, make_loader, quiet
from tests.enforcement.deltas import count_traces


class Failing(BasedModule):
    error: BaseException = RuntimeError("out of luck")

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if batch_idx == 2:
            raise self.error
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("kind", ["LoRA", "nf4"])
@pytest.mark.parametrize(
    ("error", "arrives"),
    [(RuntimeError("out of luck"), RuntimeError), (KeyboardInterrupt(), SystemExit)],
    ids=["error", "ctrl-c"],
)
def test_an_interruption_leaves_the_model_trained_so_far(
    kind: str, error: BaseException, arrives: type[BaseException]
) -> None:
    module, whole = Failing(make_base(kind)), BasedModule(make_base(kind))
    module.error = error
    flags = [weight.requires_grad for weight in module.parameters()]
    mask = mask_of(module)
    trainer = pl.Trainer(**quiet([SafetyEnhancementTuning(mask=mask)]))
    with pytest.raises(arrives):
        trainer.fit(module, make_loader(make_batches(4)))
    fit(whole, [SafetyEnhancementTuning(mask=mask)], steps=2)
    assert torch.equal(logits_of(module), logits_of(whole))
    assert [weight.requires_grad for weight in module.parameters()] == flags
    acting = sum(bool(index.numel()) for index in mask.indices.values()) if kind == "nf4" else 0
    assert count_traces(module, *trainer.optimizers) == 2 * acting


def refuse(module: OwnModule, mask: SafetyMask, message: str, **options: Any) -> None:
    before, flags = packed(module), [weight.requires_grad for weight in module.parameters()]
    trainer = pl.Trainer(**quiet([SafetyEnhancementTuning(mask=mask, **options)]))
    with pytest.raises(ValueError, match=message):
        trainer.fit(module, make_loader(make_batches(2)))
    assert count_traces(module) == 0
    assert [weight.requires_grad for weight in module.parameters()] == flags
    assert all(torch.equal(value, before[name]) for name, value in packed(module).items())


def test_refused() -> None:
    mask = mask_of(make_base("LoRA"))
    several = BasedModule(make_base("LoRA"), lambda weights: [torch.optim.SGD(weights[::2]), torch.optim.SGD(weights)])
    several.automatic_optimization = False
    refuse(several, mask, "expected to return one optimizer where the base is frozen")
    none = BasedModule(make_base("LoRA"), lambda weights: None)
    refuse(none, mask, "expected to return one optimizer .* returns 0")
    eight = BasedModule(make_base("nf4"), lambda weights: [bitsandbytes.optim.AdamW8bit(weights)])
    refuse(eight, mask, "treat every weight by its own gradient but AdamW8bit")
    partly = make_dense()
    partly.model.layers[0].mlp.up_proj.requires_grad_(False)
    refuse(BasedModule(partly), mask, r"`model\.layers\.0\.mlp\.up_proj\.weight` is frozen")
    refuse(BasedModule(make_base("nf4")), mask_of(make_dense(hidden_size=128)), "expected to fit the model")
    refuse(BasedModule(make_base("nf4")), mask, "expected a trainer with `max_steps`", average_last=2)


def test_no_reference_that_trains_too(tiny_tokenizer: Any) -> None:
    """A retention term takes the base without adapters for the start model."""
    model = make_base("LoRA", vocab_size=512)
    module = CausalLanguageModule(model, tokenizer=tiny_tokenizer, retention_weight=0.1)
    with pytest.raises(ValueError, match="`retention_weight` expected adapters on a base that stands still"):
        fit(module, [SafetyEnhancementTuning(mask=mask_of(model))])


@pytest.mark.parametrize("kind", ["frozen", "nf4"])
def test_layers_that_are_never_called_are_named(kind: str) -> None:
    module = BasedModule(make_base(kind))
    module.model.model.layers[0].mlp.forward = torch.tanh
    with pytest.warns(UserWarning, match=r"3 layers were not called during the fit.*mlp\.gate_proj\.weight, "):
        fit(module, [SafetyEnhancementTuning(mask=mask_of(module))])
