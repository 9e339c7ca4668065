# SPDX-License-Identifier: Apache-2.0
"""The loss on responses, and the divergence that keeps a model near the one it started from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from lightning_safety.data import IGNORED_LABEL
from lightning_safety.language import response_logits

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ResponsePredictions(NamedTuple):
    """What a model predicts where the labels are learned, row after row.

    Attributes:
        log_probabilities: float32 [tokens, vocabulary].
        targets: The tokens that come, int64 [tokens].
        counts: The tokens of each row, int64 [batch].
        unlikely: Rows whose tokens are what the model must not say, bool [batch]; None: none.
    """

    log_probabilities: Tensor
    targets: Tensor
    counts: Tensor
    unlikely: Tensor | None = None


def predict_responses(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> ResponsePredictions:
    """Run `model` on a batch of `pad_batch`, differentiably.

    Raises:
        ValueError: No token of the batch is learned.
    """
    unlikely = batch.get("unlikely")
    if unlikely is not None:
        batch = {**batch, "labels": torch.where(unlikely == IGNORED_LABEL, batch["labels"], unlikely)}
        unlikely = (unlikely != IGNORED_LABEL).any(dim=1)
    logits, targets, learned = response_logits(model, batch)
    if not len(targets):
        raise ValueError("`labels` expected to hold at least one learned token but all are -100. Check the responses.")
    return ResponsePredictions(logits.float().log_softmax(dim=-1), targets, learned.sum(dim=1), unlikely)


class Mean(NamedTuple):
    """A mean that is not taken yet, so that it can be over the batches of several processes.

    Attributes:
        total: The sum, a differentiable float32 scalar.
        divisor: What it is divided by, a float32 scalar; 0 where there is nothing.
    """

    total: Tensor
    divisor: Tensor

    @property
    def value(self) -> Tensor:
        """The mean; 0 where there is nothing."""
        return self.total / torch.where(self.divisor == 0, 1, self.divisor)


def response_loss(predictions: ResponsePredictions, average: str = "token", weights: Tensor | None = None) -> Mean:
    """Return the negative log-likelihood in nats per token.

    In rows that are unlikely, each token counts as -log(1 - p), p the probability of the row's tokens in turn
    (unlikelihood training, arXiv 1908.04319, of a sequence). Where p is small, that is nothing, and moves nothing.

    Args:
        predictions: Of at least one token.
        average: ``"token"``: the mean over tokens. ``"example"``: the mean over rows of each row's mean.
        weights: How often each row counts, float [batch]. None: once.
    """
    values = functional.nll_loss(predictions.log_probabilities, predictions.targets, reduction="none")
    if predictions.unlikely is not None:
        values = _with_unlikely(predictions, predictions.unlikely, values)
    if average == "token":
        weights = None if weights is None else weights.repeat_interleave(predictions.counts)
    else:
        # Not a scatter: that adds in another order in each run on a GPU.
        rows = torch.split(values, [count for count in predictions.counts.tolist() if count])
        values = torch.stack([row.mean() for row in rows])
        weights = None if weights is None else weights[predictions.counts > 0]
    if weights is None:
        return Mean(values.sum(), values.new_tensor(len(values)))
    return Mean((values * weights).sum(), weights.sum())


def _with_unlikely(predictions: ResponsePredictions, unlikely: Tensor, surprises: Tensor) -> Tensor:
    """Return -log(1 - p) of their row for tokens of unlikely rows, and for the others their own `surprises`."""
    counts = predictions.counts.tolist()
    parts = [torch.split(each, counts) for each in (predictions.log_probabilities, predictions.targets, surprises)]
    rows = zip(*parts, unlikely.tolist(), strict=True)
    return torch.cat([_rest(*row).expand(len(row[-1])) if avoided else row[-1] for *row, avoided in rows])


def _rest(log_probabilities: Tensor, targets: Tensor, surprises: Tensor) -> Tensor:
    """Return -log(1 - p) of a sequence of tokens: the first that is another one may be each of them.

    Not by 1 - p itself, of which nothing is left where p is almost 1: there it must push hardest.
    """
    others = log_probabilities.scatter(1, targets.unsqueeze(1), -torch.inf).logsumexp(dim=1)
    before = surprises - surprises.cumsum(dim=0)
    return -(before + others).logsumexp(dim=0)


def retention_divergence(
    predictions: ResponsePredictions, start_model: PreTrainedModel, batch: Mapping[str, Tensor]
) -> Mean:
    """Return the mean over the response tokens of the retention rows of KL(start model ‖ current model), in nats.

    Args:
        predictions: The current model's, on the whole batch.
        start_model: Frozen.
        batch: Has ``retention``, bool [batch].

    Raises:
        ValueError: The batch has no ``retention``.
    """
    if "retention" not in batch:
        raise ValueError(
            "`retention_weight` expected a batch that says which rows it applies to, but no source is marked. "
            "Add `retention: true` to a source of InstructionDataModule."
        )
    rows = batch["retention"]
    if not rows.any():
        return Mean(predictions.log_probabilities.new_zeros(()), predictions.log_probabilities.new_zeros(()))
    with torch.no_grad():
        start = predict_responses(start_model, {name: values[rows] for name, values in batch.items()})
    current = predictions.log_probabilities[rows.repeat_interleave(predictions.counts)]
    total = functional.kl_div(current, start.log_probabilities, reduction="sum", log_target=True)
    return Mean(total, total.new_tensor(len(current)))
