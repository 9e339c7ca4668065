# SPDX-License-Identifier: Apache-2.0
"""Tiny models with LoRA adapters, and a written-out copy of what held adapters compute."""

from __future__ import annotations

from typing import Any

import peft
import torch
from torch import Tensor, nn

from lightning_safety.language import canonical_name, weight_shape
from lightning_safety.scoring import SafetyMask, scored_weights, select_random
from tests.tiny import make_tiny_model


def make_adapted_model(seed: int = 0, *, trained: bool = False, **options: Any) -> peft.PeftModel:
    """A tiny Llama with adapters on all linear layers, in training mode; `trained`: B is not zero any more."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    model = make_tiny_model(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted = peft.get_peft_model(model, peft.LoraConfig(**settings)).train()
        if trained:
            train_adapters(adapted)
    return adapted


def train_adapters(model: nn.Module, adapter: str = "default") -> None:
    """Give B values as if it had been trained."""
    for name, weight in model.named_parameters():
        if f"lora_B.{adapter}" in name:
            weight.data = torch.randn_like(weight) * 0.1


def make_mask(model: nn.Module, fraction: float = 0.1, seed: int = 0, **options: Any) -> SafetyMask:
    weights = scored_weights(model, **options)
    return select_random(
        {name: torch.empty(weight_shape(weight), device="meta") for name, weight in weights.items()}, fraction, seed
    )


def dense_mask(mask: SafetyMask, name: str) -> Tensor:
    flat = torch.zeros(mask.shapes[name], dtype=torch.bool).view(-1)
    flat[mask.indices[name].long()] = True
    return flat.view(mask.shapes[name])


def hold_densely(model: nn.Module, mask: SafetyMask) -> None:
    """Hold by the definition: each layer's forward with the dense masked difference, for one adapter."""
    for path, layer in model.named_modules():
        name = canonical_name(f"{path}.base_layer.weight")
        if hasattr(layer, "lora_A") and name in mask.indices:
            layer.forward = _dense_forward(layer, ~dense_mask(mask, name))


def _dense_forward(layer: Any, free: Tensor) -> Any:
    def forward(inputs: Tensor) -> Tensor:
        result = layer.base_layer(inputs)
        for adapter in layer.active_adapters:
            down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter]
            product = (up.weight @ down) * layer.scaling[adapter]
            dropped = layer.lora_dropout[adapter](inputs)
            result = result + nn.functional.linear(dropped, product * free)
            if up.bias is not None:
                result = result + up.bias * layer.scaling[adapter]
        return result

    return forward


def loss_of(model: nn.Module, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 500, (2, 12), generator=generator)
    loss: Tensor = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    return loss


def gradients_of(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(seed)
    loss_of(model, seed).backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def relative_distance(found: Tensor, expected: Tensor) -> float:
    norm = torch.linalg.vector_norm(expected.double())
    return float(torch.linalg.vector_norm(found.double() - expected.double()) / norm.clamp(min=1e-12))
