# SPDX-License-Identifier: Apache-2.0
"""SPA under LoRA: the effective weights are held, whatever trains around them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import bitsandbytes
import peft
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_safety.callbacks import SafetyPreservingAdaptation
from lightning_safety.enforcement.held_lora import HeldLora, held_mask
from lightning_safety.enforcement.merge import merge_held_adapter
from lightning_safety.language import find_language_model, named_weights
from lightning_safety.scoring import RefusalMargin, SafetyMask, expected_safety_impact, select_neurons, select_top
from tests.callbacks.toys import (
    MakeOptimizers,
    OwnModule,
    assert_held,
    fit,
    make_batches,
    no_scoring,
    quiet,
    weights_of,
)
from tests.enforcement.adapters import make_adapted_model, make_mask
from tests.quantized import make_quantized_model, same_bits
from tests.tiny import make_tiny_tokenizer

OPTIMIZERS: dict[str, MakeOptimizers] = {
    "adamw": lambda weights: [torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.1)],
    "sgd": lambda weights: [torch.optim.SGD(weights, lr=0.1, momentum=0.9)],
    "adamw_8bit": lambda weights: [bitsandbytes.optim.AdamW8bit(weights, lr=1e-2, weight_decay=0.1)],
}


def masks_of(model: nn.Module) -> dict[str, SafetyMask]:
    shapes = {name: torch.empty(shape, device="meta") for name, shape in make_mask(model).shapes.items()}
    return {"weight": make_mask(model), "neuron": select_neurons(shapes, 0.1, method="random")}


@pytest.mark.parametrize("granularity", ["weight", "neuron"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_merged_weights_are_bit_identical_where_held(granularity: Any, optimizer: str, precision: Any) -> None:
    model = make_adapted_model(lora_dropout=0.1)
    mask = masks_of(model)[granularity]
    before = weights_of(make_adapted_model().unload())
    callback = SafetyPreservingAdaptation(mask=mask, granularity=granularity)
    fit(OwnModule(model, OPTIMIZERS[optimizer]), [callback], steps=20, precision=precision)
    model.eval()
    logits = logits_of(model)
    merged = merge_held_adapter(model, mask) if granularity == "weight" else model.merge_and_unload()
    assert_held(merged, before, mask, trained=list(mask.indices))
    assert torch.allclose(logits_of(merged), logits, atol=1e-5, rtol=0)


def logits_of(model: nn.Module) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=make_batches(1, vocabulary=512)[0], use_cache=False).logits
    return logits


def test_the_scores_are_those_of_the_bare_model() -> None:
    tokenizer, objective = make_tiny_tokenizer(), RefusalMargin(limit=4)
    bare = expected_safety_impact(make_adapted_model().unload(), objective, tokenizer)
    module = OwnModule(make_adapted_model(), tokenizer=tokenizer)
    callback = SafetyPreservingAdaptation(0.05, objective=objective)
    fit(module, [callback])
    assert callback.mask == select_top(bare, 0.05)
    module = OwnModule(make_adapted_model(), tokenizer=tokenizer)
    callback = SafetyPreservingAdaptation(0.05, objective=objective, granularity="neuron")
    fit(module, [callback])
    assert callback.mask == select_neurons(bare, 0.05)


def test_without_the_callback_the_effective_weights_move() -> None:
    """The control: freezing the base holds nothing under LoRA."""
    model = make_adapted_model()
    mask = make_mask(model)
    before = weights_of(make_adapted_model().unload())
    fit(OwnModule(model), [], steps=20)
    with pytest.raises(AssertionError, match="held weights moved"):
        assert_held(model.merge_and_unload(), before, mask, trained=[])


def test_a_module_that_peft_trains_whole_is_held() -> None:
    model = make_adapted_model(modules_to_save=["lm_head"])
    inner = find_language_model(model)
    mask = make_mask(inner)
    assert mask.indices["lm_head.weight"].numel()
    before = weights_of(inner)
    fit(OwnModule(model), [SafetyPreservingAdaptation(mask=mask)], steps=20)
    assert_held(inner, before, mask, trained=["lm_head.weight"])
    assert not torch.equal(model.get_base_model().lm_head.weight, model.get_base_model().lm_head.original_module.weight)


@pytest.mark.parametrize("kind", ["nf4-double", "int8"])
def test_quantised_bases_are_held(kind: str) -> None:
    """Held entries of the effective weight, read off the layer itself, are those of the dequantised base."""
    base = make_quantized_model(kind)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config).train()
    mask = make_mask(find_language_model(model))
    layer = find_language_model(model).model.layers[0].mlp.up_proj
    packed = layer.base_layer.weight.detach().clone()
    fit(OwnModule(model), [SafetyPreservingAdaptation(mask=mask)], steps=20)
    name = "model.layers.0.mlp.up_proj.weight"
    inputs = torch.eye(64)
    with torch.no_grad():
        added = (layer(inputs) - layer.base_layer(inputs)).t()
    held = torch.zeros(added.numel(), dtype=torch.bool)
    held[mask.indices[name].long()] = True
    assert added.flatten()[held].abs().max() <= 1e-6
    assert added.flatten()[~held].abs().max() > 1e-3
    assert same_bits(layer.base_layer.weight, packed)


def test_what_is_held_stays_held_after_the_fit_and_after_an_error() -> None:
    for fails in (False, True):
        model = make_adapted_model()
        mask = make_mask(model)
        callbacks: list[pl.Callback] = [SafetyPreservingAdaptation(mask=mask)]
        if fails:
            with pytest.raises(ZeroDivisionError):
                fit(OwnModule(model), [*callbacks, Fails()])
        else:
            fit(OwnModule(model), callbacks)
        assert held_mask(model) == mask


class Fails(pl.Callback):
    def on_train_batch_end(self, *_: Any) -> None:
        raise ZeroDivisionError


def test_another_fit_goes_on_with_the_same_mask_only(monkeypatch: pytest.MonkeyPatch) -> None:
    module = OwnModule(make_adapted_model(), tokenizer=make_tiny_tokenizer())
    mask = make_mask(module.model)
    before = weights_of(make_adapted_model().unload())
    callback = SafetyPreservingAdaptation(mask=mask)
    for _ in range(2):
        fit(module, [callback], steps=5)
    with pytest.raises(ValueError, match="are held by but it selects other weights"):
        fit(module, [SafetyPreservingAdaptation(0.1, objective=RefusalMargin(limit=2))])
    assert_held(merge_held_adapter(module.model, mask), before, mask, trained=list(mask.indices))


class AddsAdapter(pl.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.step:
            pl_module.model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["v_proj"]))


@pytest.mark.parametrize("step", [0, 2])
def test_adapters_added_after_the_callback_are_an_error(step: int) -> None:
    module = OwnModule(make_adapted_model())
    callback = SafetyPreservingAdaptation(mask=make_mask(module.model))
    with pytest.raises(RuntimeError, match=r"expected to stay as they were when holding began"):
        fit(module, [AddsAdapter(step), callback])


def test_a_mask_without_adapted_layers_is_an_error() -> None:
    model = make_adapted_model(target_modules=["q_proj"])
    mask = make_mask(model, include="*up_proj*")
    with pytest.raises(ValueError, match="selects none there"):
        fit(OwnModule(model), [SafetyPreservingAdaptation(mask=mask)])
    with pytest.raises(ValueError, match="selects none there"):
        fit(OwnModule(model), [SafetyPreservingAdaptation(mask=mask, granularity="neuron")])


def test_an_unknown_granularity_is_an_error() -> None:
    with pytest.raises(ValueError, match="`granularity` expected to be one of 'weight', 'neuron' but got 'row'"):
        SafetyPreservingAdaptation(granularity="row")  # type: ignore[arg-type]


def make_module() -> OwnModule:
    return OwnModule(make_adapted_model(lora_dropout=0.2), tokenizer=make_tiny_tokenizer())


@pytest.mark.parametrize("granularity", ["weight", "neuron"])
@pytest.mark.parametrize("given", [True, False])
def test_resumed_is_uninterrupted(
    tmp_path: Path, granularity: Any, given: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a loader that goes through the same batches: two epochs at once, or with a stop between them."""
    mask = masks_of(make_adapted_model())[granularity] if given else None
    make = partial(
        SafetyPreservingAdaptation, 0.1, mask=mask, objective=RefusalMargin(limit=2), granularity=granularity
    )
    torch.manual_seed(0)
    whole = make_module()
    fit(whole, [make()], max_epochs=2)
    torch.manual_seed(0)
    first = make_module()
    saved = ModelCheckpoint(tmp_path, save_last=True, save_top_k=0)
    fit(first, [make(), saved], max_epochs=1)
    second = make_module()
    with no_scoring(monkeypatch):
        fit(second, [make()], max_epochs=2, ckpt_path=tmp_path / "last.ckpt")
    found, expected = named_weights(second.model), named_weights(whole.model)
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    assert any(not torch.equal(weight, named_weights(first.model)[name]) for name, weight in expected.items())


def test_a_checkpoint_is_tested_with_its_adapters_held(tmp_path: Path) -> None:
    module = make_module()
    mask = make_mask(module.model)
    saved = ModelCheckpoint(tmp_path, save_last=True, save_top_k=0)
    fit(module, [SafetyPreservingAdaptation(mask=mask), saved])
    fresh = Evaluated(make_adapted_model(lora_dropout=0.2))
    trainer = pl.Trainer(**quiet([SafetyPreservingAdaptation(mask=mask)]))
    trainer.test(fresh, torch.utils.data.DataLoader([0]), ckpt_path=tmp_path / "last.ckpt", verbose=False)
    module.model.eval()
    assert torch.equal(fresh.logits, logits_of(module.model))
    HeldLora(mask).attach(fresh.model).release()
    assert not torch.allclose(logits_of(fresh.model), fresh.logits)


class Evaluated(OwnModule):
    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.logits = logits_of(self.model)


def test_a_checkpoint_without_our_state_is_not_taken_for_held(tmp_path: Path) -> None:
    """Its adapters were trained everywhere: holding from there on would change the model at once."""
    module = make_module()
    saved = ModelCheckpoint(tmp_path, save_last=True, save_top_k=0)
    fit(module, [saved])
    mask = make_mask(module.model)
    with (
        pytest.warns(UserWarning, match="no state of"),
        pytest.raises(ValueError, match="expected to add nothing to"),
    ):
        fit(make_module(), [SafetyPreservingAdaptation(mask=mask)], max_epochs=2, ckpt_path=tmp_path / "last.ckpt")
