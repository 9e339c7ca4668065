# SPDX-License-Identifier: Apache-2.0
"""Training on what the start model itself replies: the rows that keep it as it is."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning_safety.data import Example, TokenizedExample
from lightning_safety.language import encode_example, generate_replies
from lightning_safety.monitoring import KeywordRefusalJudge

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase


def encode_own_replies(
    examples: Sequence[Example],
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str = "examples",
    max_new_tokens: int,
) -> list[TokenizedExample]:
    """Generate the model's greedy reply to each prompt and tokenise the pairs, without an end of turn.

    Written answers teach their style as well, and a style that is not the model's own moves it far more than refusing
    does. Its own answers move it only where it has begun to answer differently. Prompts that the model refuses are left
    out, as there is no answer to keep, and counted in a warning.

    Args:
        examples: Prompts; their responses are not used.
        model: The start model.
        tokenizer: Has a chat template.
        name: Where the examples come from, for messages.
        max_new_tokens: Length of the replies, in tokens.

    Returns:
        The rows, in order, without those that are left out.

    Raises:
        ValueError: No row is left.
    """
    prompts = [example.prompt for example in examples]
    replies = generate_replies(model, tokenizer, prompts, max_new_tokens=max_new_tokens)
    verdicts = KeywordRefusalJudge().score(prompts, replies)
    rows = [
        # Most replies are cut: the model must not learn to stop there.
        encode_example(tokenizer, prompt, reply, end_turn=False)
        for prompt, reply, verdict in zip(prompts, replies, verdicts, strict=True)
        if reply and not verdict.refused
    ]
    if not rows:
        raise ValueError(
            f"`own_replies` expected prompts that the model answers but it refuses all {len(prompts)} of {name!r}. Use "
            "their written responses instead: leave `own_replies` out."
        )
    if len(rows) < len(prompts):
        warnings.warn(
            f"{len(prompts) - len(rows)} of {len(prompts)} rows of {name!r} are left out: the model refuses them or "
            "replies nothing.",
            stacklevel=2,
        )
    return rows
