# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_safety.enforcement import held_lora, matrix_entries
from lightning_safety.enforcement.held_lora import HeldLora, held_mask
from lightning_safety.scoring import SafetyMask
from tests.enforcement.adapters import (
    dense_mask,
    gradients_of,
    hold_densely,
    loss_of,
    make_adapted_model,
    make_mask,
    relative_distance,
    train_adapters,
)

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True, "lora_alpha": 3},
    "dropout": {"lora_dropout": 0.3},
    "base bias trained": {"bias": "all"},
    "some layers": {"target_modules": ["q_proj", "down_proj"]},
    "modules to save": {"modules_to_save": ["lm_head"]},
}


@pytest.fixture(autouse=True, params=[1, 2**40], ids=["within the base", "beside it"])
def _either_place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held_lora, "_TOKENS_WITHIN", request.param)


@pytest.fixture(params=[0.0, 1.0], ids=["dense", "sparse"])
def _either_form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix_entries, "_DENSE_FROM", request.param)


@pytest.mark.usefixtures("_either_form")
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_the_dense_masked_difference(kind: str) -> None:
    model = make_adapted_model(trained=True, **KINDS[kind])
    mask = make_mask(model)
    reference = copy.deepcopy(model)
    hold_densely(reference, mask)
    free = gradients_of(model)
    with HeldLora(mask).attach(model, continued=True):
        held = gradients_of(model)
        assert torch.allclose(_loss(model), _loss(reference), atol=1e-5, rtol=0)
    expected = gradients_of(reference)
    assert set(held) == set(expected)
    for name, gradient in expected.items():
        assert relative_distance(held[name], gradient) <= 1e-5, name
    # Otherwise the comparison says nothing.
    assert max(relative_distance(free[name], gradient) for name, gradient in expected.items()) > 1e-2


def _loss(model: nn.Module) -> torch.Tensor:
    torch.manual_seed(5)
    return loss_of(model).detach()


@pytest.mark.usefixtures("_either_form")
def test_training_is_that_of_the_dense_masked_difference() -> None:
    model = make_adapted_model(lora_dropout=0.1)
    mask = make_mask(model)
    reference = copy.deepcopy(model)
    hold_densely(reference, mask)
    holder = HeldLora(mask).attach(model)
    for trained in (model, reference):
        optimizer = torch.optim.SGD([weight for weight in trained.parameters() if weight.requires_grad], lr=0.5)
        torch.manual_seed(1)
        for step in range(20):
            optimizer.zero_grad()
            loss_of(trained, step).backward()
            optimizer.step()
    expected = dict(reference.named_parameters())
    for name, weight in model.named_parameters():
        if "lora_" in name:
            assert relative_distance(weight, expected[name]) <= 1e-5, name
    holder.check()


def test_the_effective_weight_is_the_base_weight_where_held() -> None:
    """Through the layer itself: a unit vector as input shows one column of the effective weight."""
    model = make_adapted_model(trained=True).eval()
    mask = make_mask(model)
    HeldLora(mask).attach(model, continued=True)
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    name = "model.layers.0.mlp.up_proj.weight"
    with torch.no_grad():
        effective = layer(torch.eye(32)).t()
    held = dense_mask(mask, name)
    base = layer.base_layer.weight
    assert held.any()
    assert torch.allclose(effective[held], base[held], atol=1e-6, rtol=0)
    free = effective[~held] - base[~held]
    expected = (2 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight)[~held]
    assert torch.allclose(free, expected, atol=1e-6, rtol=0)
    assert free.abs().max() > 0.1


def test_several_adapters_are_all_held() -> None:
    model = make_adapted_model(trained=True)
    model.add_adapter("second", peft.LoraConfig(r=2, lora_alpha=6, target_modules="all-linear"))
    train_adapters(model, "second")
    model.base_model.set_adapter(["default", "second"])
    mask = make_mask(model)
    reference = copy.deepcopy(model)
    hold_densely(reference, mask)
    HeldLora(mask).attach(model, continued=True)
    for active in (["default", "second"], ["second"]):
        for either in (model, reference):
            either.base_model.set_adapter(active)
        assert torch.allclose(_loss(model), _loss(reference), atol=1e-5, rtol=0)
        found, expected = gradients_of(model), gradients_of(reference)
        for name, gradient in expected.items():
            assert relative_distance(found[name], gradient) <= 1e-5, name


def test_layers_that_store_their_weight_transposed_are_held() -> None:
    config = GPT2Config(vocab_size=512, n_positions=32, n_embd=32, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    base = GPT2LMHeadModel(config)
    settings = peft.LoraConfig(r=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    model = peft.get_peft_model(base, settings).eval()
    train_adapters(model)
    mask = make_mask(model, include=["*c_attn*", "*c_fc*"])
    HeldLora(mask).attach(model, continued=True)
    layer, name = base.transformer.h[0].attn.c_attn, "transformer.h.0.attn.c_attn.weight"
    with torch.no_grad():
        effective = layer(torch.eye(32)) - layer.base_layer.bias
    held = dense_mask(mask, name)
    assert torch.allclose(effective[held], layer.base_layer.weight[held], atol=1e-5, rtol=0)
    assert (effective - layer.base_layer.weight)[~held].abs().max() > 0.01


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant: bool) -> None:
    model = make_adapted_model(trained=True)
    mask = make_mask(model)
    HeldLora(mask).attach(model, continued=True)
    expected = gradients_of(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    found = gradients_of(model)
    assert all(relative_distance(found[name], gradient) <= 1e-6 for name, gradient in expected.items())
    # Recomputing stops before the last layer's end; what it left would not be copied.
    again = gradients_of(copy.deepcopy(model))
    assert all(torch.equal(again[name], gradient) for name, gradient in found.items())


def test_an_input_that_a_hook_replaces_is_still_held() -> None:
    model = make_adapted_model(trained=True)
    mask = make_mask(model)
    reference = copy.deepcopy(model)
    hold_densely(reference, mask)
    HeldLora(mask).attach(model, continued=True)
    for module in model.modules():
        if hasattr(module, "base_layer"):
            module.base_layer.register_forward_pre_hook(lambda _, inputs: (inputs[0].clone(),))
    found, expected = gradients_of(model), gradients_of(reference)
    assert all(relative_distance(found[name], gradient) <= 1e-5 for name, gradient in expected.items())


def test_what_inference_left_is_trained_with() -> None:
    model = make_adapted_model(trained=True)
    HeldLora(make_mask(model)).attach(model, continued=True)
    with torch.inference_mode():
        loss_of(model)
    assert gradients_of(model)


def test_autocast_keeps_the_dtype_of_the_layer() -> None:
    model = make_adapted_model(trained=True)
    mask = make_mask(model, 0.5)
    reference = copy.deepcopy(model)
    hold_densely(reference, mask)
    HeldLora(mask).attach(model, continued=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = gradients_of(model), gradients_of(reference)
    assert all(relative_distance(found[name], gradient) <= 0.05 for name, gradient in expected.items())


def test_a_copy_of_the_model_is_held_by_itself() -> None:
    model = make_adapted_model()
    mask = make_mask(model)
    HeldLora(mask).attach(model)
    twin = copy.deepcopy(model)
    train_adapters(model)
    assert torch.equal(_loss(twin), _loss(make_adapted_model()))
    train_adapters(twin)
    reference = copy.deepcopy(twin)
    held_mask_of_twin = held_mask(twin)
    assert held_mask_of_twin == mask
    HeldLora(mask).attach(reference).release()
    hold_densely(reference, mask)
    assert torch.allclose(_loss(twin), _loss(reference), atol=1e-5, rtol=0)


def test_release_leaves_nothing_behind() -> None:
    model = make_adapted_model(trained=True)
    expected = _loss(model)
    holder = HeldLora(make_mask(model)).attach(model, continued=True)
    assert holder.layers == 14
    assert holder.bytes > 0
    assert not torch.equal(_loss(model), expected)
    holder.release()
    holder.release()
    assert torch.equal(_loss(model), expected)
    assert held_mask(model) is None
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_an_equal_mask_takes_over_and_another_is_refused() -> None:
    model = make_adapted_model()
    mask = make_mask(model)
    first = HeldLora(mask).attach(model)
    train_adapters(model)
    expected = _loss(model)
    HeldLora(SafetyMask(mask.indices, mask.shapes)).attach(model)
    assert torch.equal(_loss(model), expected)
    assert first.layers == 0
    with pytest.raises(ValueError, match="expected to be the one that the adapters of the model are held by"):
        HeldLora(make_mask(model, seed=1)).attach(model)


def test_adapters_added_or_merged_later_are_noticed() -> None:
    model = make_adapted_model()
    holder = HeldLora(make_mask(model)).attach(model)
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["v_proj"]))
    with pytest.raises(RuntimeError, match=r"expected to stay as they were .*'default', 'second'"):
        holder.check()
    model.delete_adapter("second")
    holder.check()
    model.merge_adapter()
    with pytest.raises(ValueError, match="are merged into it"):
        holder.check()


def test_a_layer_adapted_later_is_noticed() -> None:
    model = make_adapted_model(target_modules=["q_proj"])
    holder = HeldLora(make_mask(model)).attach(model)
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["v_proj"]))
    with pytest.raises(RuntimeError, match="expected to stay as they were"):
        holder.check()


def test_the_base_layer_itself_stays_what_it_is() -> None:
    """Called by itself, without its adapters, and after holding has ended."""
    model = make_adapted_model(trained=True)
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    inputs = torch.randn(3, 64, 32)
    before = layer.base_layer(inputs)
    holder = HeldLora(make_mask(model)).attach(model, continued=True)
    layer(inputs)
    assert torch.equal(layer.base_layer(inputs), before)
    with model.disable_adapter():
        assert torch.equal(layer(inputs), before)
    holder.release()
    assert "forward" not in vars(layer.base_layer)
