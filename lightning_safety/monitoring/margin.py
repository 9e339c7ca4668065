# SPDX-License-Identifier: Apache-2.0
"""The refusal margin as a plain number: how much likelier a refusal is than the opening of an answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from lightning_safety.data import Example
from lightning_safety.language import evaluation_mode
from lightning_safety.scoring import RefusalMargin

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
