# SPDX-License-Identifier: Apache-2.0
"""Training on what the start model itself replies: the rows that keep it as it is."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from lightning_safety.data import Example, TokenizedExample
from lightning_safety.language import encode_example, generate_replies
from lightning_safety.monitoring import KeywordRefusalJudge
from lightning_safety.monitoring.judges.refusal import may_go_on_to_refuse
from lightning_safety.processes import gather_shares, share_of
from lightning_safety.training.encoding import encode_examples

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

_JUDGED_TOKENS = 12
_BATCH_SIZE = 32


def encode_own_replies(
    examples: Sequence[Example],
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str = "examples",
    max_new_tokens: int,
    shared: bool = False,
) -> list[TokenizedExample]:
    """Generate the model's greedy reply to each prompt and tokenise the pairs, without an end of turn.

    Written answers teach their style as well, and a style that is not the model's own moves it far more than refusing
    does. Its own answers move it only where it has begun to answer differently. Where the model refuses, there is no
    answer to keep: the row's written response is learned, cut to the same length. Such a row without a response is left
    out, and counted in a warning.

    Args:
        examples: Prompts; their responses are used only where the model refuses.
        model: The start model.
        tokenizer: Has a chat template.
        name: Where the examples come from, for messages.
        max_new_tokens: Length of the replies, in tokens. Whether a shorter one than 12 refuses is judged on 12.
        shared: Whether the processes of the group share the prompts. Then every process must call this, and has them
            all.

    Returns:
        The rows, in order, without those that are left out.

    Raises:
        ValueError: No row is left.
    """
    prompts = [example.prompt for example in examples]

    def reply(asked: Sequence[str], length: int) -> list[str]:
        share = share_of(asked) if shared else asked
        if share:
            share = generate_replies(model, tokenizer, share, max_new_tokens=length, batch_size=_BATCH_SIZE)
        return gather_shares(share) if shared else list(share)

    replies = reply(prompts, max_new_tokens)
    judged = _long_enough_to_judge(prompts, replies, reply) if max_new_tokens < _JUDGED_TOKENS else replies
    verdicts = KeywordRefusalJudge().score(prompts, judged)
    rows = []
    for example, text, verdict in zip(examples, replies, verdicts, strict=True):
        if text and not verdict.refused:
            # Most replies are cut: the model must not learn to stop there.
            rows.append(encode_example(tokenizer, example.prompt, text, end_turn=False))
        elif example.response:
            rows += encode_examples([example], tokenizer, name=name, max_response_tokens=max_new_tokens)
    if not rows:
        raise ValueError(
            f"`own_replies` expected prompts that the model answers but it refuses all {len(prompts)} of {name!r}, and "
            "they have no written responses. Give them some, or leave the rows out."
        )
    if len(rows) < len(prompts):
        warnings.warn(
            f"{len(prompts) - len(rows)} of {len(prompts)} rows of {name!r} are left out: the model refuses them or "
            "replies nothing, and they have no written response.",
            stacklevel=2,
        )
    return rows


def _long_enough_to_judge(
    prompts: Sequence[str], replies: list[str], reply: Callable[[Sequence[str], int], list[str]]
) -> list[str]:
    """Return the replies, but those that begin like refusals at a length that tells.

    "I'm" is no refusal to a judge, and learning it as the answer to what looks harmful teaches one.
    """
    undecided = [place for place, text in enumerate(replies) if may_go_on_to_refuse(text)]
    if not undecided:
        return replies
    cut = [prompts[place] for place in undecided]
    longer = dict(zip(undecided, reply(cut, _JUDGED_TOKENS), strict=True))
    return [longer.get(place, text) for place, text in enumerate(replies)]
