# SPDX-License-Identifier: Apache-2.0
"""A merged model holds what its training held, bit for bit, and computes what the unmerged one computes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import bitsandbytes
import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_safety.enforcement.entries import count_different_bits, gather_entries
from lightning_safety.enforcement.held_lora import HeldLora, held_mask
from lightning_safety.enforcement.merge import merge_held_adapter
from lightning_safety.language import named_weights
from lightning_safety.scoring import SafetyMask
from tests.enforcement.adapted import (
    TOKENS,
    base_weights,
    fill_adapters,
    make_adapted,
    make_mask,
    make_tiny_gpt2,
)
from tests.tiny import make_tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:.*(fan_in_fan_out|tie_word_embeddings|no longer tied)")

MODELS: dict[str, Callable[[], Any]] = {
    "plain": make_adapted,
    "rank-stabilised": lambda: make_adapted(use_rslora=True, r=5),
    "biases": lambda: make_adapted(lora_bias=True, bias="lora_only"),
    "two adapters": lambda: make_adapted(adapters=("default", "other"), target_modules=["q_proj", "up_proj"]),
    "dropout": lambda: make_adapted(lora_dropout=0.5),
    "transposed": lambda: make_adapted(make_tiny_gpt2()),
    "ranks by layer": lambda: make_adapted(rank_pattern={"v_proj": 2}, alpha_pattern={"v_proj": 3}),
    "embeddings": lambda: make_adapted(
        make_tiny_model(tie_word_embeddings=False), target_modules=["embed_tokens", "q_proj", "v_proj"]
    ),
    "head": lambda: make_adapted(make_tiny_model(tie_word_embeddings=False), target_modules=["lm_head", "o_proj"]),
    "copied head": lambda: make_adapted(
        make_tiny_model(tie_word_embeddings=False), modules_to_save=["lm_head"], target_modules=["v_proj", "up_proj"]
    ),
}


def check_merge(model: Any, mask: SafetyMask) -> None:
    """Merge, and compare with the base, with peft's own merge and with the unmerged model."""
    before = base_weights(model)
    expected = copy.deepcopy(model).merge_and_unload()
    holder = HeldLora(mask).attach(model, continued=True)
    logits = model(TOKENS).logits
    merged = merge_held_adapter(model, mask)
    assert not any("forward" in vars(module) for module in merged.modules())
    weights, plain = named_weights(merged), named_weights(expected)
    assert weights.keys() == plain.keys()
    for name, weight in weights.items():
        indices = mask.indices.get(name, torch.tensor([], dtype=torch.int32))
        if len(indices):
            held = gather_entries(weight, indices)
            assert count_different_bits(held, gather_entries(before[name], indices)) == 0, name
        free = torch.ones(weight.numel(), dtype=torch.bool)
        free[indices.long()] = False
        assert count_different_bits(weight.detach().view(-1)[free], plain[name].detach().view(-1)[free]) == 0, name
    assert (merged(TOKENS).logits - logits).abs().max() <= 1e-5
    # Held or not makes a difference, so that the comparison above could fail.
    assert (expected(TOKENS).logits - logits).abs().max() > 1e-3
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in merged.modules())
    assert held_mask(merged) is None
    assert not any("lora" in name or "base_layer" in name for name, _ in merged.named_modules())
    holder.release()


@pytest.mark.parametrize("kind", MODELS)
def test_held_weights_keep_their_bits_and_all_others_are_merged_as_by_peft(kind: str) -> None:
    model = MODELS[kind]()
    check_merge(model, make_mask(model))


@settings(max_examples=8, deadline=None, derandomize=True)
@given(fraction=st.floats(0.0005, 1), seed=st.integers(0, 99))
def test_masks_of_any_size(fraction: float, seed: int) -> None:
    model = make_adapted(target_modules=["q_proj", "k_proj", "down_proj"])
    check_merge(model, make_mask(model, fraction, seed))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model = make_adapted(make_tiny_model().to(dtype))
    mask, before = make_mask(model), base_weights(model)
    HeldLora(mask).attach(model, continued=True)
    logits = model(TOKENS).logits
    merged = merge_held_adapter(model, mask)
    moved = 0
    for name, indices in mask.indices.items():
        weight = merged.get_parameter(name)
        assert weight.dtype == dtype
        kept = gather_entries(weight, indices), gather_entries(before[name], indices)
        assert count_different_bits(*kept) == 0
        moved += count_different_bits(weight.detach(), before[name])
    assert moved > 0.5 * sum(weight.numel() for weight in before.values())
    # A merged weight is rounded once more.
    assert (merged(TOKENS).logits - logits).abs().max() < 0.05


def test_a_negative_zero_stays_one() -> None:
    model = make_adapted()
    weight = model.get_parameter("base_model.model.model.layers.0.mlp.up_proj.base_layer.weight")
    weight.data.view(-1)[:4] = -0.0
    name = "model.layers.0.mlp.up_proj.weight"
    merged = merge_held_adapter(model, SafetyMask({name: torch.arange(4)}, {name: tuple(weight.shape)}))
    assert merged.get_parameter(name).view(-1)[:4].signbit().all()


def test_only_active_adapters_are_merged() -> None:
    model = make_adapted(adapters=("default", "other"))
    model.set_adapter("other")
    check_merge(model, make_mask(model))


def test_the_merged_model_can_be_saved(tmp_path: Any) -> None:
    model = make_adapted(make_tiny_model(), modules_to_save=["lm_head"])
    with torch.no_grad():
        model.get_parameter("base_model.model.lm_head.modules_to_save.default.weight").mul_(2)
    mask = make_mask(model)
    HeldLora(mask).attach(model, continued=True)
    logits = model(TOKENS).logits
    merged = merge_held_adapter(model, mask)
    merged.save_pretrained(tmp_path)
    loaded = type(merged).from_pretrained(tmp_path)
    assert torch.equal(loaded(TOKENS).logits, merged(TOKENS).logits)
    assert (loaded(TOKENS).logits - logits).abs().max() <= 1e-5


def spoil(model: Any, name: str, value: float) -> None:
    with torch.no_grad():
        model.get_parameter(name).view(-1)[0] = value


LAST_LAYER = "base_model.model.model.layers.1.mlp.down_proj"


def merged_before() -> Any:
    model = make_adapted()
    model.merge_adapter()
    return model


def with_infinity() -> Any:
    model = make_adapted()
    spoil(model, f"{LAST_LAYER}.lora_A.default.weight", float("inf"))
    return model


def with_overflow() -> Any:
    model = make_adapted(make_tiny_model().half())
    spoil(model, f"{LAST_LAYER}.base_layer.weight", 65504.0)
    spoil(model, f"{LAST_LAYER}.lora_A.default.weight", 6e4)
    spoil(model, f"{LAST_LAYER}.lora_B.default.weight", 6e4)
    return model


def with_moved_copy() -> Any:
    model = make_adapted(make_tiny_model(tie_word_embeddings=False), modules_to_save=["down_proj"])
    spoil(model, f"{LAST_LAYER}.modules_to_save.default.weight", 9.0)
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (merged_before, "merged into it"),
        (with_infinity, r"'default' expected to give finite weights but with it `model.layers.1.mlp.down_proj.weight`"),
        (with_overflow, "expected to give finite weights"),
        (with_moved_copy, r"1 of 2,048 in `model.layers.1.mlp.down_proj.weight`.*`modules_to_save`"),
        (lambda: make_adapted(make_tiny_model(), lora_bias=True), r"expected to have a bias in `model.layers.0"),
        (lambda: make_adapted(use_dora=True), "LoRA variant DoRA"),
        (
            lambda: make_adapted(make_tiny_model(), target_modules=["lm_head", "v_proj"]),
            r"is one weight under 2 names \(model.embed_tokens.weight, lm_head.weight\).*tie_word_embeddings=False",
        ),
    ],
    ids=["merged", "infinity", "overflow", "copy", "bias", "dora", "tied"],
)
def test_a_refused_merge_leaves_the_model_as_it_was(make: Callable[[], Any], message: str) -> None:
    model = make()
    shape = (32, 64)
    names = [f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 1)]
    names += [f"model.layers.{layer}.self_attn.v_proj.weight" for layer in (0, 1)]
    shapes = {name: shape if "down" in name else (16, 32) for name in names}
    mask = SafetyMask({name: torch.arange(shapes[name][0] * shapes[name][1]) for name in names}, shapes)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modules = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        merge_held_adapter(model, mask)
    assert [type(module) for module in model.modules()] == modules
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(value.nan_to_num(), after[name].nan_to_num()), name


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_base_is_refused(bits: int) -> None:
    model = make_tiny_model()
    for layer in model.model.layers:
        old = layer.mlp.up_proj
        if bits == 4:
            new = bitsandbytes.nn.Linear4bit(32, 64, bias=False, quant_type="nf4")
            new.weight = bitsandbytes.nn.Params4bit(old.weight.data, requires_grad=False, quant_type="nf4").to("cpu")
        else:
            new = bitsandbytes.nn.Linear8bitLt(32, 64, bias=False, has_fp16_weights=False)
            new.weight = bitsandbytes.nn.Int8Params(old.weight.data, requires_grad=False, has_fp16_weights=False)
            new = new.to("cpu")
        layer.mlp.up_proj = new
    model = make_adapted(model, target_modules=["v_proj"])
    with pytest.raises(ValueError, match=r"`model.layers.0.mlp.up_proj.weight` is quantised.*load_held_adapter"):
        merge_held_adapter(model, make_mask(model))


def test_masks_that_do_not_belong_to_the_adapters() -> None:
    model = make_adapted(target_modules=["v_proj"])
    mask = make_mask(model)
    name, shape = "model.layers.0.mlp.up_proj.weight", (64, 32)
    with pytest.raises(ValueError, match="expected to select weights of layers that have adapters"):
        merge_held_adapter(model, SafetyMask({name: torch.tensor([0])}, {name: shape}))
    with pytest.raises(ValueError, match="`mask` expected to fit the model"):
        merge_held_adapter(model, SafetyMask({name: torch.tensor([0])}, {name: (2, 2)}))
    HeldLora(mask).attach(model, continued=True)
    other = "model.layers.0.self_attn.v_proj.weight"
    with pytest.raises(ValueError, match="the adapters of the model are held by but it selects other weights"):
        merge_held_adapter(model, SafetyMask({other: torch.tensor([0])}, {other: (16, 32)}))


@pytest.mark.parametrize("make", [make_tiny_model, lambda: torch.nn.Linear(2, 2)])
def test_a_model_without_adapters_is_an_error(make: Callable[[], Any]) -> None:
    with pytest.raises(TypeError, match=r"`model` expected to be a PeftModel.*`peft.get_peft_model`"):
        merge_held_adapter(make(), SafetyMask({}, {}))


def test_other_kinds_of_adapters_are_named() -> None:
    model = peft.get_peft_model(make_tiny_model(), peft.IA3Config(target_modules=["v_proj"], feedforward_modules=[]))
    mask = make_mask(model)
    with pytest.raises(ValueError, match=r"kind ia3\.layer\.Linear"):
        merge_held_adapter(model, mask)
    model = make_adapted(target_modules=["v_proj"])
    model.add_adapter("other", peft.LoraConfig(target_modules=["q_proj"], use_dora=True))
    fill_adapters(model)
    name = "model.layers.0.self_attn.v_proj.weight"
    with pytest.raises(ValueError, match=r"q_proj` has one of the kind lora\.layer\.Linear \(DoraLinearVariant\)"):
        merge_held_adapter(model, SafetyMask({name: torch.tensor([0])}, {name: (16, 32)}))
