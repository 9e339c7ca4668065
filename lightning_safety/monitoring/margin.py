# SPDX-License-Identifier: Apache-2.0
"""How likely refusals are, as plain numbers: over the opening of an answer, and by themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from lightning_safety.data import Example, length_buckets, pad_batch
from lightning_safety.language import encode_example, evaluation_mode, pad_token_id
from lightning_safety.scoring import RefusalMargin
from lightning_safety.scoring.objective import ObjectiveBatch, first_labelled, mean_log_probability

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def refusal_margin(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    batch_size: int = 16,
) -> float | None:
    """Return the mean `RefusalMargin` in nats per token; needs no generation.

    Args:
        model: A causal language model. It is left as it was found.
        tokenizer: Its tokenizer, with a chat template.
        examples: Harmful prompts with the refusals written for them. Those without one are left out.
        batch_size: Examples at a time.

    Returns:
        The mean over examples: above 0 where a refusal is likelier than "Sure, here is". None without refusals.
    """
    refused = [example for example in examples if example.response]
    if not refused:
        return None
    objective = RefusalMargin(examples=refused)
    device = next(model.parameters()).device
    total = 0.0
    with evaluation_mode(model), torch.no_grad():
        for batch in objective.batches(tokenizer, batch_size=batch_size):
            # The objective is a loss, the mean over the examples of its batch.
            total -= float(objective.loss(model, batch.to(device))) * batch.examples
    return total / len(refused)


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
    device, total = next(model.parameters()).device, 0.0
    with evaluation_mode(model), torch.no_grad():
        for bucket in length_buckets([len(row.input_ids) for row in rows], batch_size):
            batch = pad_batch([rows[index] for index in bucket], pad_token_id=pad_token_id(tokenizer))
            tensors = ObjectiveBatch(batch, len(bucket)).to(device).tensors
            total += float(mean_log_probability(model, tensors).sum())
    return total / len(rows)
