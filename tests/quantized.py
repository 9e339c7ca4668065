# SPDX-License-Identifier: Apache-2.0
"""Tiny models whose linear layers bitsandbytes quantised, and the dense models that these stand for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bitsandbytes.functional import has_avx512bf16
from transformers import BitsAndBytesConfig, LlamaForCausalLM

from lightning_safety.language import dequantized_weight, quantized_layers
from tests.tiny import make_tiny_model

WIDE = {"hidden_size": 64, "intermediate_size": 128}
"""Sizes that the kernel for CPUs with AVX512-BF16 takes: multiples of a block of 64."""

FOUR_BIT: dict[str, dict[str, Any]] = {
    "nf4": {"bnb_4bit_quant_type": "nf4"},
    "nf4-double": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"bnb_4bit_quant_type": "fp4"},
    "nf4-in-bfloat16": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": "bfloat16"},
}

repacks = pytest.mark.skipif(not has_avx512bf16(), reason="bitsandbytes repacks on CPUs with AVX512-BF16 only")


def make_quantized_model(kind: str = "nf4-double", dense: Any = None, **settings: Any) -> Any:
    """Quantise a tiny model as ``from_pretrained`` does, without what `load_causal_lm` does about repacking."""
    dense = make_tiny_model(**WIDE) if dense is None else dense
    arguments = {"load_in_8bit": True} if kind == "int8" else {"load_in_4bit": True, **FOUR_BIT[kind]}
    return type(dense).from_pretrained(
        None,
        config=dense.config,
        state_dict=dense.state_dict(),
        quantization_config=BitsAndBytesConfig(**arguments, **settings),
        device_map={"": "cpu"},
        dtype=dense.dtype,
    )


def dense_twin(model: Any) -> LlamaForCausalLM:
    """The dense model of the dequantised weights."""
    twin = LlamaForCausalLM(model.config).to(model.dtype).eval()
    layers = dict(quantized_layers(model))
    weights = {f"{name}.weight": dequantized_weight(layer) for name, layer in layers.items()}
    weights |= {name: weight for name, weight in model.named_parameters() if name not in weights}
    weights["lm_head.weight"] = model.lm_head.weight
    twin.load_state_dict(weights)
    return twin


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are equal byte by byte: packed numbers may look like NaN."""
    one, other = one.detach().reshape(-1), other.detach().reshape(-1)
    return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference, as a share of that of what is expected."""
    return float((found - expected).detach().norm() / expected.detach().norm())
