# SPDX-License-Identifier: Apache-2.0
"""Perplexity of written replies, with an interval over examples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import bootstrap
from torch import nn

from lightning_safety.data import Example, TokenizedExample, length_buckets, pad_batch
from lightning_safety.language import encode_example, evaluation_mode, pad_token_id, response_log_probabilities
from lightning_safety.monitoring.rates import finite_or_none
from lightning_safety.progress import track

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Perplexity:
    """exp(mean negative log-likelihood per response token) and its 95 % interval.

    Attributes:
        value: The perplexity; NaN where there is no example.
        low: Lower end of the interval; NaN for fewer than two examples.
        high: Upper end of the interval.
        tokens: Response tokens predicted.
        examples: Examples they come from.

    Example:
        >>> print(Perplexity(value=8.125, low=7.5, high=9.0, tokens=800, examples=40))
        8.12 [7.50, 9.00] n=40
    """

    value: float
    low: float
    high: float
    tokens: int
    examples: int

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for a JSON file; None stands for NaN and infinity."""
        return {
            "value": finite_or_none(self.value),
            "low": finite_or_none(self.low),
            "high": finite_or_none(self.high),
            "tokens": self.tokens,
            "examples": self.examples,
        }

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}] n={self.examples}"


def perplexity(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    batch_size: int = 16,
    end_turn: bool = True,
    seed: int = 0,
    show_progress: bool = True,
) -> Perplexity:
    """Measure how well a model predicts given replies: exp(mean negative log-likelihood per response token).

    Args:
        model: A causal language model. It is left as it was found.
        tokenizer: Its tokenizer, with a chat template.
        examples: Prompts with responses. Those whose response is blank are left out.
        batch_size: Examples at a time; it changes nothing but rounding.
        end_turn: Whether the end-of-turn token is predicted too. False for replies that were cut when generated.
        seed: Of the bootstrap over examples (9,999 resamples, percentiles of the ratio of sums).
        show_progress: Whether to show a progress bar if it takes over two seconds.

    Returns:
        The perplexity over all response tokens together: long replies weigh more.

    Raises:
        ValueError: An example has no response.
    """
    rows = _encode(tokenizer, examples, end_turn)
    losses, tokens = np.zeros(len(rows)), np.zeros(len(rows))
    device = next(model.parameters()).device
    batches = length_buckets([len(row.input_ids) for row in rows], batch_size)
    with evaluation_mode(model), torch.no_grad():
        for indices in track(batches, "perplexity", enabled=show_progress):
            batch = pad_batch([rows[index] for index in indices], pad_token_id=pad_token_id(tokenizer))
            total, count = response_log_probabilities(model, {name: value.to(device) for name, value in batch.items()})
            losses[indices] = -total.double().cpu().numpy()
            tokens[indices] = count.cpu().numpy()
    low, high = _interval(losses, tokens, seed)
    return Perplexity(
        value=float(_ratio_of_sums(losses, tokens, axis=0)) if rows else math.nan,
        low=low,
        high=high,
        tokens=int(tokens.sum()),
        examples=len(rows),
    )


def _encode(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], end_turn: bool) -> list[TokenizedExample]:
    rows = []
    for example in examples:
        if example.response is None:
            raise ValueError(
                f"`examples` expected to have a response each but {example.prompt!r:.80} has none. "
                f"Leave it out, or name the column that holds the responses with `response_column`."
            )
        if example.response.strip():
            rows.append(encode_example(tokenizer, example.prompt, example.response, end_turn=end_turn))
    return rows


def _ratio_of_sums(losses: Array, tokens: Array, axis: int = -1) -> Array:
    with np.errstate(over="ignore"):
        return np.asarray(np.exp(losses.sum(axis=axis) / tokens.sum(axis=axis)))


def _interval(losses: Array, tokens: Array, seed: int) -> tuple[float, float]:
    if len(losses) < 2:
        return math.nan, math.nan
    result = bootstrap(
        (losses, tokens),
        _ratio_of_sums,
        paired=True,
        vectorized=True,
        method="percentile",
        # Resamples at a time: 8 MB an array.
        batch=max(1, 1_000_000 // len(losses)),
        random_state=np.random.default_rng(seed),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)
