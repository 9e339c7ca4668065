# SPDX-License-Identifier: Apache-2.0
"""Quantised weights: told apart, their shape and values, kept readable, and refused where they cannot be read."""

from __future__ import annotations

import contextlib
import copy
import subprocess
import sys
from typing import Any

import accelerate
import bitsandbytes
import pytest
import torch
from bitsandbytes.nn.parametrize import replace_parameter_4bit
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_safety.language import (
    check_quantization_supported,
    dequantized_weight,
    is_quantized_weight,
    keep_unpacked,
    quantized_layers,
    weight_shape,
)
from lightning_safety.language.quantized import exact_inputs
from tests.quantized import FOUR_BIT, WIDE, dense_twin, make_quantized_model, relative_error, repacks, same_bits
from tests.tiny import make_tiny_model

UP = "model.layers.0.mlp.up_proj"
IDS = torch.arange(5, 21).view(2, 8)


@pytest.mark.parametrize("kind", [*FOUR_BIT, "int8"])
def test_a_weight_has_the_shape_and_about_the_values_it_had(kind: str) -> None:
    dense = make_tiny_model(**WIDE)
    model = make_quantized_model(kind, dense)
    layers = dict(quantized_layers(model))
    assert len(layers) == 14
    for name, layer in layers.items():
        original = dense.get_submodule(name).weight
        assert is_quantized_weight(layer.weight)
        assert weight_shape(layer.weight) == tuple(original.shape)
        found = dequantized_weight(layer)
        assert found.shape == original.shape
        assert found.dtype == torch.float32
        assert 0 < relative_error(found, original) < (0.01 if kind == "int8" else 0.13)
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        weight = model.get_parameter(name)
        assert not is_quantized_weight(weight)
        assert weight_shape(weight) == tuple(weight.shape)


def test_storage_in_bfloat16_does_not_hide_a_quantised_weight() -> None:
    weight = make_quantized_model("nf4-in-bfloat16").get_submodule(UP).weight
    assert weight.is_floating_point()
    assert is_quantized_weight(weight)


@pytest.mark.parametrize("kind", ["nf4-double", "int8"])
def test_the_values_are_what_the_layer_multiplies_with(kind: str) -> None:
    model = make_quantized_model(kind)
    keep_unpacked(model)
    layer = model.get_submodule(UP)
    before = dequantized_weight(layer)
    inputs = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    # In training mode the 8-bit layer does not quantise its inputs.
    found = layer.train()(inputs)
    torch.testing.assert_close(found, inputs @ before.T, rtol=1e-5, atol=1e-6)
    # The first forward pass moves what int8 needs.
    assert torch.equal(dequantized_weight(layer), before)


@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_eight_bit_layers_can_take_their_inputs_as_they_are(bias: bool, spread: bool) -> None:
    torch.manual_seed(0)
    layer = bitsandbytes.nn.Linear8bitLt(64, 8, bias=bias, has_fp16_weights=False, threshold=1.0).to("cpu").eval()
    if spread:
        accelerate.hooks.add_hook_to_module(layer, accelerate.hooks.AlignDevicesHook("cpu"))
    before, weight = dict(vars(layer)), dequantized_weight(layer)
    inputs = torch.randn(2, 3, 64, requires_grad=True)
    expected = nn.functional.linear(inputs, weight, layer.bias)
    (expected_gradient,) = torch.autograd.grad(expected.pow(2).sum(), inputs)
    with contextlib.suppress(KeyError), exact_inputs(layer):
        found = layer(inputs)
        raise KeyError
    (gradient,) = torch.autograd.grad(found.pow(2).sum(), inputs)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient, expected_gradient)
    assert vars(layer).keys() == before.keys()
    assert all(vars(layer)[name] is value for name, value in before.items())
    assert relative_error(layer(inputs), expected) > 1e-4


def test_half_precision_is_dequantised_to_itself() -> None:
    model = make_quantized_model("nf4", make_tiny_model(**WIDE).bfloat16())
    assert dequantized_weight(model.get_submodule(UP)).dtype == torch.bfloat16


def test_a_dense_model_needs_no_bitsandbytes() -> None:
    code = (
        "import sys, torch\nfrom lightning_safety.language import *\nmodel = torch.nn.Linear(2, 3)\n"
        "keep_unpacked(model), check_quantization_supported(model)\n"
        "assert not is_quantized_weight(model.weight) and weight_shape(model.weight) == (3, 2)\n"
        "assert not list(quantized_layers(model))\nassert 'bitsandbytes' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def adapter_gradients(model: Any, *, looked_at: bool = True) -> dict[str, torch.Tensor]:
    """The gradient of each adapter weight that gets one, after a pass without gradient in evaluation mode, or none."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    if looked_at:
        with torch.no_grad():
            model.eval()(input_ids=IDS)
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    adapters = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    # Those of A are zero as long as B is.
    return {name: weight.grad for name, weight in adapters.items() if "lora_B" in name and weight.grad is not None}


@pytest.mark.parametrize("kind", FOUR_BIT)
def test_kept_unpacked_a_base_passes_all_gradients_and_keeps_its_values(kind: str) -> None:
    model = make_quantized_model(kind)
    state = copy.deepcopy(model.state_dict())
    expected = adapter_gradients(dense_twin(model), looked_at=False)
    keep_unpacked(model)
    found = adapter_gradients(model)
    assert len(found) == 14
    for name, gradient in found.items():
        assert relative_error(gradient, expected[name]) <= 1e-5
    for name, value in model.state_dict().items():
        assert "lora_" in name or same_bits(value, state[name.replace(".base_layer", "")]), name


@repacks
@pytest.mark.parametrize("kind", FOUR_BIT)
def test_without_it_gradients_are_wrong_on_this_cpu(kind: str) -> None:
    expected = adapter_gradients(make_quantized_model(kind), looked_at=False)
    found = adapter_gradients(make_quantized_model(kind))
    wrong = [name for name in expected if name not in found or relative_error(found[name], expected[name]) > 0.1]
    assert len(wrong) >= 7


@repacks
def test_a_repacked_weight_is_refused() -> None:
    model = make_quantized_model()
    with torch.no_grad():
        model(input_ids=IDS)
    with pytest.raises(ValueError, match=r"`model.layers.0.self_attn.q_proj` was repacked .* Load the model again"):
        keep_unpacked(model)
    with pytest.raises(ValueError, match=r"the layer was repacked"):
        dequantized_weight(model.get_submodule(UP))


def test_what_can_be_read_is_accepted() -> None:
    for model in (make_tiny_model(), *(make_quantized_model(kind) for kind in (*FOUR_BIT, "int8"))):
        check_quantization_supported(model)
        check_quantization_supported(get_peft_model(model, LoraConfig(r=2, target_modules="all-linear")))


def marked_as(method: str | None) -> Any:
    model: Any = make_tiny_model()
    model.is_quantized, model.quantization_method = True, method
    return nn.ModuleDict({"inner": model})


class QuantLinear(nn.Module):
    """As GPTQ's and AWQ's: no weight, but packed numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.zeros(4, 8, dtype=torch.int32))


def fused_experts() -> nn.Module:
    """What bitsandbytes does to an expert weight that is no linear layer."""
    module = nn.ParameterDict({"experts": nn.Parameter(torch.randn(2, 64, 64))})
    replace_parameter_4bit(module, "experts")
    return module


def transposed() -> nn.Module:
    config = GPT2Config(n_layer=1, n_head=2, n_embd=64, vocab_size=30, n_positions=16)
    model: nn.Module = make_quantized_model("nf4", GPT2LMHeadModel(config))
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: marked_as("gptq"), "`inner` is quantised by gptq. Load the unquantised model"),
        (lambda: marked_as(None), "`inner` is quantised by an unknown method"),
        (lambda: nn.Sequential(nn.ReLU(), QuantLinear()), "`1` is a QuantLinear, which packs"),
        (QuantLinear, "it is a QuantLinear"),
        (fused_experts, "`parametrizations.experts.0` is a Bnb4bitParametrization"),
        (lambda: bitsandbytes.nn.Linear4bit(64, 64), "it is not quantised yet. Move the model to its device"),
        (lambda: bitsandbytes.nn.Linear8bitLt(64, 64, has_fp16_weights=False), "it is not quantised yet"),
        (lambda: bitsandbytes.nn.Linear8bitLt(64, 64).to("cpu"), r"llm_int8_has_fp16_weight=True"),
        (transposed, "`transformer.h.0.attn.c_attn` was a Conv1D"),
    ],
)
def test_what_cannot_be_read_is_refused(model: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_quantization_supported(model())


def test_four_bits_without_scales_have_no_shape() -> None:
    with pytest.raises(ValueError, match=r"4-bit weights with their scales but one has none"):
        weight_shape(bitsandbytes.nn.Linear4bit(64, 64).weight)
