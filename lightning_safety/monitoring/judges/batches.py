# SPDX-License-Identifier: Apache-2.0
"""Asking a model about many replies: those that can be read and fit, in batches of similar length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import nn

from lightning_safety.data import length_buckets
from lightning_safety.language import evaluation_mode
from lightning_safety.monitoring.judges.protocol import Verdict, check_lengths
from lightning_safety.monitoring.judges.refusal import why_unreadable
from lightning_safety.progress import track

Row = TypeVar("Row")


def judge_in_batches(
    model: nn.Module,
    name: str,
    prompts: Sequence[str],
    responses: Sequence[str],
    *,
    encode: Callable[[str, str], Row],
    tokens: Callable[[Row], int],
    judge: Callable[[Sequence[Row]], Sequence[Verdict]],
    longest: int | None,
    batch_size: int,
) -> list[Verdict]:
    """Return one verdict for each reply; one that is empty, only repeats itself or is too long is not scored.

    Args:
        model: In evaluation mode and without gradients while it is asked.
        name: What the progress bar and the reasons call it.
        prompts: What the user said.
        responses: What the model replied, one for each prompt.
        encode: Makes of a prompt and its reply what the model reads.
        tokens: How many tokens that is.
        judge: Asks the model about a batch.
        longest: At most so many tokens; None for any number.
        batch_size: Replies judged at a time.

    Raises:
        ValueError: There is another number of responses than of prompts.
    """
    check_lengths(prompts, responses)
    verdicts = [Verdict(None, None, reason=why_unreadable(response) or "") for response in responses]
    rows: dict[int, Row] = {}
    for index, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        if verdicts[index].reason:
            continue
        row = encode(prompt, response)
        if longest is not None and tokens(row) > longest:
            verdicts[index] = Verdict(None, None, reason=f"{tokens(row)} tokens are too long for the {name}")
            continue
        rows[index] = row
    places = list(rows)
    with evaluation_mode(model), torch.no_grad():
        for bucket in track(
            length_buckets([tokens(rows[place]) for place in places], batch_size), f"Asking the {name}"
        ):
            chosen = [places[position] for position in bucket]
            for place, verdict in zip(chosen, judge([rows[place] for place in chosen]), strict=True):
                verdicts[place] = verdict
    return verdicts
