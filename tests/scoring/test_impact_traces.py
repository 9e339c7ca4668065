# SPDX-License-Identifier: Apache-2.0
"""Scoring leaves no trace in the model, its gradients or any random number generator."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from lightning_safety.scoring import (
    ObjectiveBatch,
    RefusalLikelihood,
    RefusalMargin,
    expected_safety_impact,
)
from tests.tiny import make_tiny_model


def test_frozen_weights_are_scored_and_stay_frozen(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_tiny_model()
    expected = expected_safety_impact(model, RefusalMargin(limit=4), tiny_tokenizer)
    model.requires_grad_(False)
    found = expected_safety_impact(model, RefusalMargin(limit=4), tiny_tokenizer)
    assert all(torch.equal(found[name], score) for name, score in expected.items())
    assert not any(weight.requires_grad for weight in model.parameters())


def disturb(model: LlamaForCausalLM) -> dict[str, Any]:
    """Give a model a state that careless scoring would change, and return that state."""
    model.train()
    model.model.layers[0].eval()
    model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    model.config.use_cache = True
    for number, weight in enumerate(model.parameters()):
        weight.grad = torch.full_like(weight, float(number)) if number % 2 and weight.requires_grad else None
    return {
        "values": [weight.detach().clone() for weight in model.parameters()],
        "gradients": [
            (id(weight.grad), None if weight.grad is None else weight.grad.clone()) for weight in model.parameters()
        ],
        "requires_grad": [weight.requires_grad for weight in model.parameters()],
        "modes": [module.training for module in model.modules()],
    }


def assert_undisturbed(model: LlamaForCausalLM, state: dict[str, Any]) -> None:
    for weight, value, (identity, gradient) in zip(
        model.parameters(), state["values"], state["gradients"], strict=True
    ):
        assert torch.equal(weight, value)
        assert id(weight.grad) == identity
        assert gradient is None or torch.equal(weight.grad, gradient)  # type: ignore[arg-type]
    assert [weight.requires_grad for weight in model.parameters()] == state["requires_grad"]
    assert [module.training for module in model.modules()] == state["modes"]
    assert model.config.use_cache is True
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class Failing(RefusalMargin):
    def loss(self, model: nn.Module, batch: ObjectiveBatch) -> Tensor:
        torch.rand(5), random.random(), np.random.rand()
        loss = super().loss(model, batch)
        if batch.examples < 4:
            raise KeyboardInterrupt
        return loss


@pytest.mark.parametrize("interrupted", [False, True])
def test_leaves_no_trace(
    interrupted: bool, tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    state = disturb(tiny_model)
    calls: list[str] = []
    for weight in tiny_model.parameters():
        if weight.requires_grad:
            weight.register_post_accumulate_grad_hook(lambda _: calls.append("accumulated"))
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    expected = torch.rand(1), random.random(), np.random.rand()
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    if interrupted:
        with pytest.raises(KeyboardInterrupt):
            expected_safety_impact(tiny_model, Failing(limit=6), tiny_tokenizer, batch_size=4)
    else:
        expected_safety_impact(tiny_model, Failing(limit=8), tiny_tokenizer, batch_size=4)
    assert (torch.rand(1), random.random(), np.random.rand()) == expected
    assert calls == []
    assert_undisturbed(tiny_model, state)


def test_the_loss_curve_is_the_same_with_and_without_scoring(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    def curve(*, scoring: bool) -> list[float]:
        torch.manual_seed(3)
        model = make_tiny_model(attention_dropout=0.2).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        objective = RefusalLikelihood(limit=8)
        losses = []
        for step, batch in enumerate(objective.batches(tiny_tokenizer, batch_size=2)):
            if scoring and step % 2 == 0:
                expected_safety_impact(model, RefusalMargin(limit=3), tiny_tokenizer)
            loss = objective.loss(model, batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        return losses

    assert curve(scoring=True) == curve(scoring=False)
