# SPDX-License-Identifier: Apache-2.0
"""How likely refusals are, as plain numbers: over the opening of an answer, and by themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from lightning_safety.data import Example
from lightning_safety.language import encode_example, evaluation_mode
from lightning_safety.processes import gather, share_of
from lightning_safety.scoring import ObjectiveBatch, RefusalMargin
from lightning_safety.scoring.objective import batches_by_length, first_labelled, mean_log_probability

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def refusal_margin(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    batch_size: int = 16,
    shared: bool = False,
) -> float | None:
    """Return the mean `RefusalMargin` in nats per token; needs no generation.

    Args:
        model: A causal language model. It is left as it was found.
        tokenizer: Its tokenizer, with a chat template.
        examples: Harmful prompts with the refusals written for them. Those without one are left out.
        batch_size: Examples at a time.
        shared: Whether the processes of the group share the examples. Then every process must call this.

    Returns:
        The mean over examples: above 0 where a refusal is likelier than "Sure, here is". None without refusals.
    """
    refused = [example for example in examples if example.response]
    if not refused:
        return None
    total = 0.0
    if share := share_of(refused) if shared else refused:
        objective = RefusalMargin(examples=share)
        total = _sum_over(
            model,
            objective.batches(tokenizer, batch_size=batch_size),
            # The objective is a loss, the mean over the examples of its batch.
            lambda batch: -float(objective.loss(model, batch)) * batch.examples,
        )
    return sum(gather(total) if shared else [total]) / len(refused)


def opening_likelihood(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    tokens: int,
    batch_size: int = 16,
) -> float:
    """Return the mean log-probability per token, in nats, of how the responses begin; needs no generation.

    Args:
        model: A causal language model. It is left as it was found.
        tokenizer: Its tokenizer, with a chat template.
        examples: Prompts with responses; at least one.
        tokens: How many tokens of each response count.
        batch_size: Examples at a time.
    """
    rows = [
        first_labelled(encode_example(tokenizer, example.prompt, example.response or "", end_turn=False), tokens)
        for example in examples
    ]
    total = _sum_over(
        model,
        batches_by_length(rows, tokenizer, batch_size),
        lambda batch: float(mean_log_probability(model, batch.tensors, packed=True).sum()),
    )
    return total / len(rows)


def _sum_over(model: nn.Module, batches: Sequence[ObjectiveBatch], score: Callable[[ObjectiveBatch], float]) -> float:
    """Return the sum over all batches of a score, without gradients, on the model in evaluation mode."""
    device = next(model.parameters()).device
    with evaluation_mode(model), torch.no_grad():
        return sum(score(batch.to(device)) for batch in batches)
