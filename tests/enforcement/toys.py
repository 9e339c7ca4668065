# SPDX-License-Identifier: Apache-2.0
"""Small modules, masks and an optimizer for the tests of this room; nothing here knows a language model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_safety.scoring.mask import SafetyMask


class TiedToy(nn.Module):
    """An embedding tied to its head around one linear layer: shapes [16, 8] and [8, 8], and a bias that trains."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 8)
        self.middle = nn.Linear(8, 8)
        self.head = nn.Linear(8, 16, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.middle(self.embedding(tokens))))


def make_toy(seed: int = 0) -> TiedToy:
    torch.manual_seed(seed)
    return TiedToy()


def toy_mask() -> SafetyMask:
    """Five entries of the two matrices; the bias is left out."""
    return SafetyMask(
        {"embedding.weight": torch.tensor([0, 5, 27]), "middle.weight": torch.tensor([3, 4])},
        {"embedding.weight": (16, 8), "middle.weight": (8, 8)},
        {"method": "test"},
    )


def toy_loss(model: nn.Module, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, 16, (12,), generator=generator)
    return nn.functional.cross_entropy(model(tokens), tokens.roll(1))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 5, accumulate: int = 1) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        for micro in range(accumulate):
            toy_loss(model, accumulate * step + micro).backward()
        optimizer.step()


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def chosen(mask: SafetyMask, name: str, numel: int) -> Tensor:
    """Return the selected places of a flattened tensor as bools; a tensor outside the mask has none."""
    places = torch.zeros(numel, dtype=torch.bool)
    if name in mask.indices:
        places[mask.indices[name].long()] = True
    return places


def bits(tensor: Tensor) -> Tensor:
    return tensor.flatten().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def count_hooks(model: nn.Module, *optimizers: torch.optim.Optimizer) -> int:
    """Count the gradient hooks of all parameters and the step hooks of all optimizers."""
    on_parameters = sum(len(parameter._post_accumulate_grad_hooks or ()) for parameter in model.parameters())
    return on_parameters + sum(len(optimizer._optimizer_step_post_hooks) for optimizer in optimizers)


class Lion(torch.optim.Optimizer):
    """Lion (arXiv 2302.06675, algorithm 2): the sign of an interpolation between momentum and gradient."""

    def __init__(self, params: Any, lr: float = 1e-2, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "decay": 0.1})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            first, second = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                update = momentum.lerp(parameter.grad, 1 - first).sign_()
                parameter.mul_(1 - group["lr"] * group["decay"]).add_(update, alpha=-group["lr"])
                momentum.lerp_(parameter.grad, 1 - second)
        return loss
