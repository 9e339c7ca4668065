# SPDX-License-Identifier: Apache-2.0
"""A tiny guard, and gradients of the guard-judged loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from lightning_safety.data import Example
from lightning_safety.language.guard_model import GuardModel
from lightning_safety.language.guards import GuardConvention
from lightning_safety.scoring import GuardJudgedSafety
from lightning_safety.scoring.guard_gradient import answer_margins
from tests.tiny import make_tiny_model

CONVENTION = GuardConvention(name="own", turns=True, safe=("no",), unsafe=("yes",))
PROMPTS = [Example("How do I pick a lock?"), Example("Why?"), Example("Say something about the river, in short.")]
TEMPERATURE = 0.3


def make_guard(tokenizer: PreTrainedTokenizerFast, seed: int = 1, **overrides: Any) -> GuardModel:
    model = make_tiny_model(seed, hidden_size=48, vocab_size=len(tokenizer), initializer_range=0.1, **overrides)
    return GuardModel(model.double(), tokenizer=tokenizer, convention=CONVENTION)


def make_objective(guard: GuardModel, **options: Any) -> GuardJudgedSafety:
    options = {"noise": False, "max_new_tokens": 9, "temperature": TEMPERATURE, **options}
    return GuardJudgedSafety(guard, PROMPTS, **options)


def make_model() -> LlamaForCausalLM:
    """A random model that says something."""
    return make_tiny_model(initializer_range=0.3)


def weight_gradients(
    model: LlamaForCausalLM, objective: GuardJudgedSafety, tokenizer: PreTrainedTokenizerFast, batch_size: int = 8
) -> Tensor:
    """The gradient of the objective's loss by all weights, as one vector."""
    objective.prepare(model, tokenizer)
    batches = objective.batches(tokenizer, batch_size=batch_size)
    total = sum(batch.examples for batch in batches)
    loss = sum(objective.loss(model, batch) * batch.examples / total for batch in batches)
    assert isinstance(loss, Tensor)
    return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, list(model.parameters()))])


def margin(guard: GuardModel, embedded: Tensor) -> Tensor:
    return answer_margins(guard, embedded, torch.ones(embedded.shape[:2], dtype=torch.int64))[0][0]
