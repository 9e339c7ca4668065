# SPDX-License-Identifier: Apache-2.0
"""How often a model gives the one right answer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from lightning_safety.data import Example
from lightning_safety.language import generate_replies
from lightning_safety.monitoring.rates import Rate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# "What is 6 + 5?" is answered "6 + 5 = 11.", and often explained afterwards.
_END_OF_SENTENCE = re.compile(r"[.!?](?=\W|$)|\n")
_WORD = re.compile(r"\w+")


def exact_match(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Example],
    *,
    max_new_tokens: int = 24,
    batch_size: int = 32,
    show_progress: bool = True,
) -> Rate:
    """Return how often the last word of the reply's first sentence is the task's answer, case ignored.

    Args:
        model: A causal language model. It is left as it was found.
        tokenizer: Its tokenizer, with a chat template.
        tasks: Prompts with the answer, one word or number, as response; such as `known_answer_tasks`.
        max_new_tokens: Length of a reply, in tokens.
        batch_size: Replies at a time.
        show_progress: Whether to show a bar when it takes over two seconds.
    """
    prompts = [task.prompt for task in tasks]
    replies = generate_replies(
        model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size, show_progress=show_progress
    )
    right = [answer_in(reply) == (task.response or "").lower() for task, reply in zip(tasks, replies, strict=True)]
    return Rate(sum(right), len(right), len(right))


def answer_in(reply: str) -> str:
    """Return the last word of a reply's first sentence in lower case; empty where it has none.

    Example:
        >>> answer_in("6 + 5 = 11.")
        '11'
        >>> answer_in('The first letter of the word "house" is "H." It is a noun.')
        'h'
    """
    words = _WORD.findall(_END_OF_SENTENCE.split(reply.strip(), maxsplit=1)[0])
    return words[-1].lower() if words else ""
