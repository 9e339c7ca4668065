# SPDX-License-Identifier: Apache-2.0
"""Differentiable measures of safety: what the weights are scored for, and what rehearsal trains."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_safety.arguments import check_positive
from lightning_safety.data import Example, TokenizedExample, length_buckets, load_prompts, pad_batch
from lightning_safety.data.collator import IGNORED_LABEL
from lightning_safety.language.branches import packed_log_probabilities, paired_log_probabilities, paired_tokens_run
from lightning_safety.language.chat import encode_example
from lightning_safety.language.likelihood import response_log_probabilities
from lightning_safety.language.prefix import TokensRun, tokens_run
from lightning_safety.language.tokenizer import pad_token_id
from lightning_safety.processes import from_first, world_size

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROMPT_SHOWN = 60


@dataclass(frozen=True)
class ObjectiveBatch:
    """Examples of an objective, ready for `SafetyObjective.loss`.

    Attributes:
        tensors: What the objective needs, by name.
        examples: How many examples these are: the weight of the batch in a mean over examples.
    """

    tensors: dict[str, Tensor]
    examples: int

    def to(self, device: torch.device | str) -> ObjectiveBatch:
        """Return the same batch on `device`."""
        return ObjectiveBatch({name: tensor.to(device) for name, tensor in self.tensors.items()}, self.examples)


class SafetyObjective(ABC):
    """A differentiable safety score S of a model: higher is safer, and its loss is −S.

    To write one, give `batches` and `loss`, and `prepare` if it needs the model before. The score over all examples is
    the mean over examples: `loss` returns the mean over its own batch, and whoever adds batches up weighs them by
    `ObjectiveBatch.examples`.

    Attributes:
        bounded: Whether the loss has a lower bound, so that training on it comes to an end.
    """

    bounded = True

    @property
    def prepares(self) -> bool:
        """Whether `prepare` does something: what follows from it depends on the model at that time."""
        return type(self).prepare is not SafetyObjective.prepare

    def expect(self, examples: int | None) -> None:  # noqa: B027 # most have their examples ready
        """Hear, before `prepare`, how many examples will be taken in all; None where that is not known."""

    def prepare(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:  # noqa: B027 # most need nothing
        """Do what needs the model as it is before scoring, such as generating its replies. Called before `batches`."""

    def prepare_together(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
        """Prepare in all processes, so that all have the same: where `state_dict` tells it, what the first one found.

        Replies may differ by a rounding between processes.
        """
        self.prepare(model, tokenizer)
        if world_size() > 1 and (state := from_first(self.state_dict())):
            self.load_state_dict(state)

    def state_dict(self) -> dict[str, Any]:
        """Return what `prepare` found, as tensors and primitives, where it cannot be found again; else nothing."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # noqa: B027 # most need nothing
        """Take what `prepare` found earlier, in its place. Called only with what `state_dict` returned."""

    @abstractmethod
    def batches(self, tokenizer: PreTrainedTokenizerBase, *, batch_size: int) -> list[ObjectiveBatch]:
        """Return all examples, tokenised, in batches of at most `batch_size` examples, on the CPU."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: ObjectiveBatch) -> Tensor:
        """Return −S, the mean over the examples of the batch: a scalar, differentiable in the model's weights.

        Args:
            model: A causal language model, in the mode the caller wants.
            batch: On the model's device.
        """

    def tokens_run(self, model: nn.Module, batch: ObjectiveBatch) -> TokensRun:
        """Return how many tokens `loss` runs, for an estimate of its memory.

        Raises:
            ValueError: The batch has no ``input_ids`` and ``attention_mask``.
        """
        if not {"input_ids", "attention_mask"} <= batch.tensors.keys():
            raise ValueError(
                f"`objective` expected to have `input_ids` and `attention_mask` in its batches but"
                f" {type(self).__name__} has {', '.join(batch.tensors)}. Override its `tokens_run`, or pass `tokens`."
            )
        return tokens_run(model, batch.tensors["input_ids"], batch.tensors["attention_mask"])

    def describe(self) -> dict[str, str]:
        """Return what the objective is, for the metadata of a mask."""
        return {"objective": type(self).__name__}


class ExampleObjective(SafetyObjective):
    """What the objectives over a prompt set share: which examples. See `RefusalLikelihood` for the arguments."""

    def __init__(
        self,
        examples: str | os.PathLike[str] | Sequence[Example] = "harmful",
        *,
        split: str | None = "score",
        limit: int | None = None,
    ) -> None:
        if limit is not None:
            check_positive(limit, "limit")
        self.examples = examples
        self.split = split
        self.limit = limit

    def describe(self) -> dict[str, str]:
        """Return the objective's name and its examples."""
        described = super().describe()
        if isinstance(self.examples, str | os.PathLike):
            described["examples"] = os.fspath(self.examples)
            if self.split is not None:
                described["split"] = self.split
        else:
            described["examples"] = f"{len(self.examples)} given examples"
        if self.limit is not None:
            described["limit"] = str(self.limit)
        return described

    def load_examples(self) -> list[Example]:
        """Return the examples.

        Raises:
            ValueError: There is none.
        """
        if isinstance(self.examples, str | os.PathLike):
            return load_prompts(self.examples, split=self.split, limit=self.limit)
        if not self.examples:
            raise ValueError("`examples` expected to hold at least one example but is empty. Pass at least one prompt.")
        return list(self.examples)[: self.limit]

    def _load_pairs(self) -> list[tuple[str, str]]:
        """Return (prompt, response) of each example.

        Raises:
            ValueError: There is none, or one has no response.
        """
        rows = []
        for number, example in enumerate(self.load_examples(), start=1):
            if not example.response:
                raise ValueError(
                    f"`examples` expected to have a response in every row but row {number}"
                    f" ({example.prompt[:_PROMPT_SHOWN]!r}) has none. Write one, or leave the row out."
                )
            rows.append((example.prompt, example.response))
        return rows


class RefusalLikelihood(ExampleObjective):
    """How likely the written responses are: refusals to harmful prompts, good answers to others.

    S = mean over examples of the mean log-probability per token of the example's response, its end of turn included.
    In nats, at most 0.

    Args:
        examples: What `load_prompts` takes (a built-in set, a file, a hub data set), or examples themselves. Each needs
            a response.
        split: The split to load; None for a file without splits. Without meaning for examples given themselves.
        limit: Take only the first so many.

    Raises:
        ValueError: From `batches`, if there are no examples or one has no response.

    Example:
        >>> from tests.tiny import make_tiny_model, make_tiny_tokenizer
        >>> objective = RefusalLikelihood("harmful", split="score", limit=4)
        >>> batch, = objective.batches(make_tiny_tokenizer(), batch_size=4)
        >>> objective.loss(make_tiny_model(), batch).item() > 0
        True
    """

    def batches(self, tokenizer: PreTrainedTokenizerBase, *, batch_size: int) -> list[ObjectiveBatch]:
        """Return the examples in batches of similar length, padded on the right."""
        rows = [encode_example(tokenizer, prompt, response) for prompt, response in self._load_pairs()]
        return batches_by_length(rows, tokenizer, batch_size)

    def loss(self, model: nn.Module, batch: ObjectiveBatch) -> Tensor:
        """Return the mean over examples of the mean negative log-probability per response token."""
        return -mean_log_probability(model, batch.tensors).mean()


class RefusalMargin(ExampleObjective):
    """How much likelier a refusal begins than a willing answer does: for scoring and watching.

    S = mean over examples of [mean log-probability per token of the refusal's first tokens − that of a fixed opening].
    In nats; above 0 where refusing is likelier. It has no upper bound, so as a training loss it would run away.

    Args:
        examples: As for `RefusalLikelihood`; the responses are refusals.
        split: As for `RefusalLikelihood`.
        limit: As for `RefusalLikelihood`.
        opening: How a willing answer begins. It stops before any content, and no end of turn follows it.
        refusal_tokens: How many tokens of a refusal count. They are those that decide; the rest follows from them.

    Raises:
        ValueError: `opening` is blank, or `refusal_tokens` or `limit` is below 1. From `batches`, if there are no
            examples or one has no response.
    """

    bounded = False

    def __init__(
        self,
        examples: str | os.PathLike[str] | Sequence[Example] = "harmful",
        *,
        split: str | None = "score",
        limit: int | None = None,
        opening: str = "Sure, here is",
        refusal_tokens: int = 16,
    ) -> None:
        super().__init__(examples, split=split, limit=limit)
        if not opening.strip():
            raise ValueError(
                '`opening` expected to be words but is blank. Pass for instance `opening="Sure, here is"`.'
            )
        self.opening = opening
        self.refusal_tokens = check_positive(refusal_tokens, "refusal_tokens")

    def describe(self) -> dict[str, str]:
        """Return the objective's name, its examples, and what is compared."""
        return {**super().describe(), "opening": self.opening, "refusal_tokens": str(self.refusal_tokens)}

    def batches(self, tokenizer: PreTrainedTokenizerBase, *, batch_size: int) -> list[ObjectiveBatch]:
        """Return the examples in batches of similar length; in each, first all refusals, then as many openings."""
        pairs = []
        for prompt, response in self._load_pairs():
            refusal = encode_example(tokenizer, prompt, response, end_turn=False)
            opening = encode_example(tokenizer, prompt, self.opening, end_turn=False)
            pairs.append((first_labelled(refusal, self.refusal_tokens), opening))
        buckets = length_buckets([max(len(row.input_ids) for row in pair) for pair in pairs], batch_size)
        padding = pad_token_id(tokenizer)
        batches = []
        for bucket in buckets:
            rows = [pairs[index][branch] for branch in (0, 1) for index in bucket]
            batches.append(ObjectiveBatch(pad_batch(rows, pad_token_id=padding), len(bucket)))
        return batches

    def tokens_run(self, model: nn.Module, batch: ObjectiveBatch) -> TokensRun:
        """Return how many tokens `loss` runs: prompts once for both answers where the model can."""
        return paired_tokens_run(model, batch.tensors)

    def loss(self, model: nn.Module, batch: ObjectiveBatch) -> Tensor:
        """Return the mean over examples of log-probability of the opening − that of the refusal, each per token."""
        sums, counts = paired_log_probabilities(model, batch.tensors)
        scores = sums / counts
        return (scores[batch.examples :] - scores[: batch.examples]).mean()


def mean_log_probability(model: nn.Module, tensors: dict[str, Tensor], *, packed: bool = False) -> Tensor:
    """Return the mean log-probability per labelled token of each row, run as one row if `packed`. float32 [rows]."""
    sums, counts = (packed_log_probabilities if packed else response_log_probabilities)(model, tensors)
    return sums / counts


def batches_by_length(
    rows: Sequence[TokenizedExample], tokenizer: PreTrainedTokenizerBase, batch_size: int
) -> list[ObjectiveBatch]:
    """Return all rows in batches of similar length, padded on the right."""
    padding = pad_token_id(tokenizer)
    return [
        ObjectiveBatch(pad_batch([rows[index] for index in bucket], pad_token_id=padding), len(bucket))
        for bucket in length_buckets([len(row.input_ids) for row in rows], batch_size)
    ]


def first_labelled(row: TokenizedExample, count: int) -> TokenizedExample:
    """Return the row up to its `count`-th labelled token; whole if it has no more."""
    places = [place for place, label in enumerate(row.labels) if label != IGNORED_LABEL]
    end = places[:count][-1] + 1
    return TokenizedExample(row.input_ids[:end], row.labels[:end])
