# SPDX-License-Identifier: Apache-2.0
"""Bases that do not train, masks on their linear layers, and training by the definition to compare with."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import torch
from torch import Tensor, nn

from lightning_safety.language import find_language_model, named_weights
from lightning_safety.language.quantized import weight_shape
from lightning_safety.scoring import SafetyMask, scored_weights, select_random
from tests.enforcement.adapted import make_tiny_gpt2
from tests.enforcement.adapters import loss_of, make_adapted_model
from tests.enforcement.toys import Lion
from tests.quantized import make_quantized_model
from tests.tiny import make_tiny_model

TOKENS = torch.arange(3, 43).reshape(2, 20)

# Where a gradient is next to nothing, a smaller epsilon makes steps out of its rounding.
_ADAMW = {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-6}

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda weights: torch.optim.AdamW(weights, **_ADAMW),
    "adamw-fused": lambda weights: torch.optim.AdamW(weights, **_ADAMW, fused=True),
    "sgd": lambda weights: torch.optim.SGD(weights, lr=0.5, momentum=0.9, weight_decay=0.1),
    "lion": lambda weights: Lion(weights, lr=1e-4),
}

BASES: dict[str, Callable[[], Any]] = {
    "frozen": lambda: make_tiny_model().requires_grad_(False),
    "frozen GPT-2": lambda: make_tiny_gpt2().requires_grad_(False),
    "LoRA": make_adapted_model,
    "LoRA, trained": lambda: make_adapted_model(trained=True),
    "LoRA, other biases": lambda: make_adapted_model(trained=True, bias="all", modules_to_save=["lm_head"]),
}


def make_base(kind: str) -> nn.Module:
    """Return the causal language model of a base, without what peft puts around it."""
    if kind in BASES:
        return find_language_model(BASES[kind]())
    quantization, _, adapted = kind.partition(" under ")
    model = make_quantized_model(quantization)
    if not adapted:
        return model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        settings = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        return find_language_model(peft.get_peft_model(model, settings))


def make_mask(model: nn.Module, fraction: float = 0.1, seed: int = 0, **options: Any) -> SafetyMask:
    """Select some weights of linear layers, quantised ones too: none of the first tensor, and all of the second."""
    shapes = {name: weight_shape(weight) for name, weight in scored_weights(model, **options).items()}
    mask = select_random({name: torch.empty(shape, device="meta") for name, shape in shapes.items()}, fraction, seed)
    indices = dict(mask.indices)
    if len(indices) > 2:
        first, second = list(indices)[:2]
        indices[first], indices[second] = indices[first][:0], torch.arange(shapes[second][0] * shapes[second][1])
    return SafetyMask(indices, mask.shapes, {"method": "random"})


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 20, *, first: int = 0) -> None:
    """Two passes a step."""
    for step in range(first, first + steps):
        optimizer.zero_grad()
        for micro in range(2):
            loss_of(model, 2 * step + micro).backward()
        optimizer.step()


def train_dense(model: nn.Module, mask: SafetyMask, make: Callable[[Any], Any], steps: int = 20) -> nn.Module:
    """Return a copy trained by the definition: whole weights, unselected gradients zero, unselected values put back."""
    model = copy.deepcopy(model)
    weights = named_weights(model)
    flags = {name: weight.requires_grad for name, weight in weights.items()}
    free = {}
    for name, weight in weights.items():
        weight.requires_grad_(name in mask.indices)
        if name in mask.indices:
            places = torch.zeros(weight.numel(), dtype=torch.bool)
            places[mask.indices[name].long()] = True
            free[name] = places.view_as(weight)
    start = {name: weights[name].detach().clone() for name in free}
    optimizer = make([weights[name] for name in free])
    for step in range(steps):
        optimizer.zero_grad()
        for micro in range(2):
            loss_of(model, 2 * step + micro).backward()
        for name, places in free.items():
            weights[name].grad.mul_(places)
        optimizer.step()
        with torch.no_grad():
            for name, places in free.items():
                weights[name].copy_(torch.where(places, weights[name], start[name]))
    for name, weight in weights.items():
        weight.requires_grad_(flags[name])
    return model


def logits_of(model: nn.Module) -> Tensor:
    """Without dropout; the mode stays as it was."""
    training = model.training
    with torch.no_grad():
        logits: Tensor = model.eval()(TOKENS, use_cache=False).logits
    model.train(training)
    return logits


def count_traces(model: nn.Module, *optimizers: torch.optim.Optimizer) -> int:
    """Count hooks on modules, parameters and optimizers, and attributes of this package on modules."""
    modules = list(model.modules())
    found = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules)
    found += sum(name.startswith("_lightning_safety") for module in modules for name in vars(module))
    found += sum(len(weight._post_accumulate_grad_hooks or ()) for weight in model.parameters())
    return found + sum(len(optimizer._optimizer_step_post_hooks) for optimizer in optimizers)
