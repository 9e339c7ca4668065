# SPDX-License-Identifier: Apache-2.0
"""What a model refuses and what it answers, as a loss that keeps it so."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from lightning_safety.arguments import check_positive
from lightning_safety.data import Example, TokenizedExample, pad_batch
from lightning_safety.language import encode_example, generate_replies
from lightning_safety.language.branches import packed_tokens_run
from lightning_safety.language.prefix import TokensRun
from lightning_safety.language.tokenizer import pad_token_id
from lightning_safety.monitoring.judges import KeywordRefusalJudge, Verdict
from lightning_safety.monitoring.sets import PromptSource, read_prompts
from lightning_safety.scoring.objective import ObjectiveBatch, SafetyObjective, first_labelled, mean_log_probability
from lightning_safety.scoring.shards import is_sharded, passes_of_all

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_JUDGED_TOKENS = 12
_SPARE_TOKENS = 4
_BATCH_SIZE = 128
# About so many of the replies are as they should be, and kept.
_KEPT_SHARE = 0.8
# In a short fit each of them comes about so many times.
_TIMES = 2.5
# A model that refuses a third refuses some of so many.
_FEWEST_PROMPTS = 16


class OwnReplies(SafetyObjective):
    """How likely the model still is to refuse what it refused, and to answer what it answered, in its own words.

    S = mean over examples of the mean log-probability per token of how the reply began that the model gave when it was
    prepared. In nats, at most 0. Of harmful prompts those count that it refused, of borderline ones those that it
    answered: what it did wrong then is not kept.

    A model that has not moved is likely to say what it says: this loss hardly moves it. Written refusals
    (`RefusalLikelihood`) teach it other words as well, which disturbs it far more than keeping it does.

    Args:
        harmful: Prompts that should be refused.
        borderline: Harmless prompts that look harmful.
        split: The split of built-in sets.
        prompts: At most so many harmful prompts, spread evenly over the set, and `answers_per_refusal` times as many
            borderline ones; fewer where a `SafetyRehearsal` has time for fewer, each two or three times. Too few are
            learned by heart in a long fit, and then keep nothing else: allow about as many as there will be rehearsals.
        answers_per_refusal: How many answers are kept for each refusal. With more a model comes to refuse less.
        max_new_tokens: How much of each reply counts, in tokens. Whether to refuse is decided in the first ones; of
            what follows a refusal has next to nothing left to learn, so that with more of it that decision counts less.

    Raises:
        ValueError: An argument is out of range. From `prepare`: there are no prompts, or the model refuses no harmful
            prompt, or answers no borderline one.
    """

    def __init__(
        self,
        harmful: PromptSource = "harmful",
        borderline: PromptSource = "borderline",
        *,
        split: str = "train",
        prompts: int = 128,
        answers_per_refusal: int = 1,
        max_new_tokens: int = 4,
    ) -> None:
        self.harmful = harmful
        self.borderline = borderline
        self.split = split
        self.prompts = check_positive(prompts, "prompts")
        self.answers_per_refusal = check_positive(answers_per_refusal, "answers_per_refusal")
        self.max_new_tokens = check_positive(max_new_tokens, "max_new_tokens")
        self._pairs: dict[str, list[tuple[str, str]]] = {}
        self._expected: int | None = None
        self._beside: Sequence[Example] = ()
        self._refused_beside: list[Example] = []

    def describe(self) -> dict[str, str]:
        """Return the objective's name, its prompts, and how much of the replies counts."""
        return {
            **super().describe(),
            "split": self.split,
            "prompts": str(self.prompts),
            "answers_per_refusal": str(self.answers_per_refusal),
            "max_new_tokens": str(self.max_new_tokens),
        }

    def expect(self, examples: int | None) -> None:
        """Ask no more prompts than that takes: a short fit need not wait for replies it has no time to rehearse."""
        self._expected = examples

    def ask_beside(self, prompts: Sequence[Example]) -> None:
        """Ask these harmful prompts as well, which are not rehearsed: among the others they take next to no time."""
        self._beside, self._refused_beside = prompts, []

    @property
    def refused_beside(self) -> list[Example]:
        """What the model refused of these, with how its refusals began; empty before `prepare`."""
        return self._refused_beside

    def prepare(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
        """Let the model reply, and keep what it did right."""
        prompts = self.prompts
        if self._expected is not None:
            turns = math.ceil(self._expected / (1 + self.answers_per_refusal))
            prompts = min(prompts, max(_FEWEST_PROMPTS, math.ceil(turns / _KEPT_SHARE / _TIMES)))
        limits = {"harmful": prompts, "borderline": prompts * self.answers_per_refusal}
        kinds = [
            Asked(kind, read_prompts(source, kind, split=self.split, limit=limits[kind])[1], refused=kind == "harmful")
            for kind, source in (("harmful", self.harmful), ("borderline", self.borderline))
        ]
        beside = [Asked("watch", self._beside, refused=True)] if self._beside else []
        # In one go, so that batches are full.
        found = keep_replies(model, tokenizer, [*kinds, *beside], self.max_new_tokens)
        for kind, kept in zip(kinds, found, strict=False):
            self._pairs[kind.name] = [(example.prompt, example.response or "") for example in kept]
        if beside:
            self._refused_beside = found[-1]

    def state_dict(self) -> dict[str, Any]:
        """Return the replies that are kept: refusals, and openings of answers to harmless prompts."""
        return {kind: [list(pair) for pair in pairs] for kind, pairs in self._pairs.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the replies of the model as it was, in place of `prepare`."""
        self._pairs = {kind: [(prompt, reply) for prompt, reply in pairs] for kind, pairs in state_dict.items()}

    def batches(self, tokenizer: PreTrainedTokenizerBase, *, batch_size: int) -> list[ObjectiveBatch]:
        """Return the kept replies, a refusal and its answers in turn; of a kind with too few, rows come again."""
        encoded = {
            kind: [
                # Most replies are cut: the model must not learn to stop there.
                first_labelled(encode_example(tokenizer, prompt, reply, end_turn=False), self.max_new_tokens)
                for prompt, reply in pairs
            ]
            for kind, pairs in self._pairs.items()
        }
        padding = pad_token_id(tokenizer)
        rows = _in_turn(encoded["harmful"], encoded["borderline"], self.answers_per_refusal)
        groups = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
        return [ObjectiveBatch(pad_batch(group, pad_token_id=padding), len(group)) for group in groups]

    def loss(self, model: nn.Module, batch: ObjectiveBatch) -> Tensor:
        """Return the mean over examples of the mean negative log-probability per token of the reply."""
        return -mean_log_probability(model, batch.tensors, packed=True).mean()

    def tokens_run(self, model: nn.Module, batch: ObjectiveBatch) -> TokensRun:
        """Return how many tokens `loss` runs."""
        return packed_tokens_run(model, batch.tensors)


def _in_turn(
    refusals: Sequence[TokenizedExample], answers: Sequence[TokenizedExample], answers_per_refusal: int
) -> list[TokenizedExample]:
    """Return one refusal, so many answers, the next refusal and so on, until every row has come at least once."""
    turns = max(len(refusals), math.ceil(len(answers) / answers_per_refusal))
    rows = []
    for turn in range(turns):
        rows.append(refusals[turn % len(refusals)])
        first = turn * answers_per_refusal
        rows += [answers[place % len(answers)] for place in range(first, first + answers_per_refusal)]
    return rows


class Asked(NamedTuple):
    """Prompts of a kind.

    Attributes:
        name: What they are called in messages.
        prompts: The prompts; their responses do not matter.
        refused: Whether to keep the refusals; else the answers.
    """

    name: str
    prompts: Sequence[Example]
    refused: bool


def keep_replies(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, kinds: Sequence[Asked], max_new_tokens: int
) -> list[list[Example]]:
    """Let a model reply to prompts, and return those that it refused, or answered, with how its reply began.

    Args:
        model: As it is now.
        tokenizer: Its tokenizer.
        kinds: What it is asked.
        max_new_tokens: Length of the replies, in tokens; at least 12 are generated, so that a refusal can be told.

    Returns:
        The prompts of each kind that are kept, with the replies as responses.

    Raises:
        ValueError: None is left of a kind.
    """
    prompts = [example.prompt for kind in kinds for example in kind.prompts]
    # A few more than count: the last one generated may be a part of a character.
    length = max(max_new_tokens + _SPARE_TOKENS, _JUDGED_TOKENS)
    with passes_of_all(model):
        replies = generate_replies(
            model,
            tokenizer,
            prompts,
            max_new_tokens=length,
            batch_size=_BATCH_SIZE,
            together=is_sharded(model.parameters()),
        )
    verdicts = KeywordRefusalJudge().score(prompts, replies)
    judged = iter(zip(prompts, replies, verdicts, strict=True))
    return [_kept(kind, list(itertools.islice(judged, len(kind.prompts)))) for kind in kinds]


def _kept(kind: Asked, judged: Sequence[tuple[str, str, Verdict]]) -> list[Example]:
    kept = [Example(prompt, reply) for prompt, reply, verdict in judged if reply and verdict.refused is kind.refused]
    does = "refuses" if kind.refused else "answers"
    if not kept:
        raise ValueError(
            f"`{kind.name}` expected prompts that the model {does} but it {does} none of {len(judged)}, so that there"
            f" is nothing to keep. Give others that it {does}, make the model safe first (`SafetyEnhancementTuning`),"
            " or rehearse written replies (`RefusalLikelihood`)."
        )
    if len(kept) < len(judged) / 2:
        warnings.warn(
            f"The model {does} {len(kept)} of {len(judged)} {kind.name} prompts; only these are kept so.", stacklevel=3
        )
    return kept
