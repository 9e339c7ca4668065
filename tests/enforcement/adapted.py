# SPDX-License-Identifier: Apache-2.0
"""Tiny models with LoRA adapters that look trained, and masks on their base weights."""

from __future__ import annotations

import math
from typing import Any

import peft
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from lightning_safety.language import canonical_name
from lightning_safety.language.quantized import weight_shape
from lightning_safety.scoring import SafetyMask
from tests.tiny import make_tiny_model

TOKENS = torch.arange(3, 43).reshape(2, 20)


def make_tiny_gpt2() -> GPT2LMHeadModel:
    """Its linear layers are `Conv1D`: they store [in, out]."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=512, n_positions=64, n_embd=32, n_layer=2, n_head=4)
        return GPT2LMHeadModel(config).eval()


def make_adapted(
    model: PreTrainedModel | None = None, *, adapters: tuple[str, ...] = ("default",), **options: Any
) -> Any:
    """Put adapters with random weights on a tiny model, all of them active."""
    settings = {"r": 4, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    base = make_tiny_model(attention_bias=True, mlp_bias=True) if model is None else model
    adapted = peft.get_peft_model(base, peft.LoraConfig(**settings), adapter_name=adapters[0])
    for adapter in adapters[1:]:
        adapted.add_adapter(adapter, peft.LoraConfig(**settings | {"r": 3}))
    if len(adapters) > 1:
        adapted.base_model.set_adapter(list(adapters))
    fill_adapters(adapted)
    return adapted.eval()


def fill_adapters(model: torch.nn.Module) -> None:
    """Give every weight of an adapter a value, as training would."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)


def base_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the weights under the adapters, by canonical name."""
    return {
        canonical_name(name): weight.detach().clone()
        for name, weight in model.named_parameters()
        if name.endswith(".base_layer.weight")
    }


def make_mask(model: torch.nn.Module, fraction: float = 0.1, seed: int = 2) -> SafetyMask:
    """Select a random part of every weight under an adapter; nothing of the first, all of the second."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        canonical_name(name): weight_shape(weight)
        for name, weight in model.named_parameters()
        if name.endswith(".base_layer.weight")
    }
    indices = {
        name: (torch.rand(math.prod(shape), generator=generator) < (0.0, 1.0, fraction)[min(place, 2)]).nonzero()[:, 0]
        for place, (name, shape) in enumerate(shapes.items())
    }
    return SafetyMask(indices, shapes, {"method": "random"})
