# SPDX-License-Identifier: Apache-2.0
"""The safety score of the paper: what a guard model says of the model's own replies, as a function of its weights."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn

from lightning_safety.arguments import check_positive
from lightning_safety.data import Example, TokenizedExample, length_buckets, pad_batch
from lightning_safety.data.collator import IGNORED_LABEL
from lightning_safety.language.chat import tokenize_reply
from lightning_safety.language.generation import generate_replies
from lightning_safety.language.guard_model import GuardModel
from lightning_safety.language.guards import GuardConvention
from lightning_safety.language.likelihood import response_logits
from lightning_safety.language.tokenizer import pad_token_id
from lightning_safety.language.vocabulary_map import check_fast
from lightning_safety.progress import track
from lightning_safety.scoring.guard_gradient import GuardVerdict, input_embeddings, judge_reply, token_embeddings
from lightning_safety.scoring.objective import ExampleObjective, ObjectiveBatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# Where the guard gives all its answers together less probability than this, it says something else.
_SMALLEST_SHARE = 0.05


class _JudgedReply(NamedTuple):
    row: TokenizedExample  # prompt and reply; the reply's tokens are labelled
    verdict: GuardVerdict


class GuardJudgedSafety(ExampleObjective):
    r"""How safe a guard model finds the model's replies.

    S = mean over prompts of [logit of the guard's safe answer − logit of its unsafe answer] on the model's own greedy
    reply ("Towards Identification and Intervention of Safety-Critical Parameters in LLMs", arXiv 2604.08297, §3). A
    reply is a choice of tokens and has no gradient; its tokens are relaxed: :math:`q_t = \mathrm{onehot}(y_t) + p_t -
    \mathrm{stopgrad}(p_t)` with :math:`p_t = \mathrm{softmax}((\mathrm{logits}_t + g_t) / \tau)` and Gumbel noise g. So
    the guard sees the reply itself, and the gradient says which other tokens it would like better.

    The guard is asked once for each reply, before any weight is scored, and is not needed after that. Where its
    vocabulary is another one, its gradient is carried to the model's tokens by the characters that they share
    (`align_tokens`, `vocabulary_map`).

    Args:
        guard: A `GuardModel`, or what one takes as its model.
        examples: Prompts, as for `RefusalLikelihood`; their responses are not used.
        split: As for `RefusalLikelihood`.
        limit: As for `RefusalLikelihood`.
        convention: How the guard is asked, if `guard` is not a `GuardModel` already.
        max_new_tokens: Length of the replies, in tokens.
        temperature: τ.
        noise: Whether Gumbel noise is added.
        seed: Of the noise, which is drawn for each prompt by itself.
        batch_size: Replies generated at a time.

    Raises:
        ValueError: An argument is out of range. From `prepare`: the guard cannot be asked, no reply can be judged, or
            one of the tokenizers does not say which characters a token comes from.
    """

    def __init__(
        self,
        guard: GuardModel | nn.Module | str | os.PathLike[str],
        examples: str | os.PathLike[str] | Sequence[Example] = "harmful",
        *,
        split: str | None = "score",
        limit: int | None = None,
        convention: GuardConvention | str | None = None,
        max_new_tokens: int = 256,
        temperature: float = 0.3,
        noise: bool = True,
        seed: int = 0,
        batch_size: int = 16,
    ) -> None:
        super().__init__(examples, split=split, limit=limit)
        if not 0 < temperature < float("inf"):
            raise ValueError(f"`temperature` expected to be above 0 but got {temperature!r}. The paper's is 0.3.")
        self.guard = guard
        self.convention = convention
        self.max_new_tokens = check_positive(max_new_tokens, "max_new_tokens")
        self.temperature = temperature
        self.noise = noise
        self.seed = seed
        self.batch_size = check_positive(batch_size, "batch_size")
        self._judged: list[_JudgedReply] = []
        self._embeddings = torch.empty(0)
        self._prepared_for: tuple[object, ...] | None = None

    def describe(self) -> dict[str, str]:
        """Return the objective's name, its prompts, the guard and how replies are made and relaxed."""
        guard = self.guard.model if isinstance(self.guard, GuardModel) else self.guard
        name = getattr(guard, "name_or_path", type(guard).__name__) if isinstance(guard, nn.Module) else guard
        return {
            **super().describe(),
            "guard": str(name),
            "max_new_tokens": str(self.max_new_tokens),
            "temperature": str(self.temperature),
            "noise": f"seed {self.seed}" if self.noise else "none",
        }

    def prepare(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
        """Generate the replies and ask the guard, once for each state of the model."""
        state = (ref(model), ref(tokenizer), sum(weight._version for weight in model.parameters()))
        if state == self._prepared_for:
            return
        check_fast(tokenizer, "tokenizer")
        guard = self.guard if isinstance(self.guard, GuardModel) else GuardModel(self.guard, convention=self.convention)
        check_fast(guard.tokenizer, "guard")
        prompts = [example.prompt for example in self.load_examples()]
        replies = generate_replies(
            model, tokenizer, prompts, max_new_tokens=self.max_new_tokens, batch_size=self.batch_size
        )
        self._embeddings = token_embeddings(guard, tokenizer, len(input_embeddings(model).weight))
        pairs = list(zip(prompts, replies, strict=True))
        judged = [_judge(guard, tokenizer, *pair) for pair in track(pairs, "Asking the guard")]
        self._judged = [found for found in judged if found is not None]
        _report(len(prompts), [found.verdict for found in self._judged], guard)
        self._prepared_for = state

    def batches(self, tokenizer: PreTrainedTokenizerBase, *, batch_size: int) -> list[ObjectiveBatch]:
        """Return prompts and replies in batches of similar length, with the number of each (``index``)."""
        if self._prepared_for is None:
            raise RuntimeError(
                "`batches` expected judged replies but there are none. Call `prepare` with the model first"
            )
        rows = [judged.row for judged in self._judged]
        padding = pad_token_id(tokenizer)
        return [
            ObjectiveBatch(
                {**pad_batch([rows[index] for index in bucket], pad_token_id=padding), "index": torch.tensor(bucket)},
                len(bucket),
            )
            for bucket in length_buckets([len(row.input_ids) for row in rows], batch_size)
        ]

    def loss(self, model: nn.Module, batch: ObjectiveBatch) -> Tensor:
        """Return −S, whose gradient is that of the relaxed replies."""
        tensors = dict(batch.tensors)
        numbers = tensors.pop("index").tolist()
        verdicts = [self._judged[number].verdict for number in numbers]
        logits, _, counted = response_logits(model, tensors)
        parts = torch.split(logits, counted.sum(dim=1).tolist())
        with torch.no_grad():
            slopes = [self._slope(*item) for item in zip(parts, verdicts, numbers, strict=True)]
        # Linear in the logits, with the value and the gradient that S has here: the graph ends where p enters the
        # guard, which has been asked already.
        linear = (logits.float() * torch.cat(slopes)).sum()
        score = sum(verdict.score for verdict in verdicts)
        loss: Tensor = -(linear - linear.detach() + score) / len(verdicts)
        return loss

    def _slope(self, logits: Tensor, verdict: GuardVerdict, number: int) -> Tensor:
        """Return ∂S/∂logits of one reply's tokens. float32 [reply tokens, vocabulary]."""
        noisy = logits.float()
        if self.noise:
            generator = torch.Generator().manual_seed(self.seed + number)
            exponential = torch.empty(logits.shape).exponential_(generator=generator)
            noisy = noisy - exponential.log().to(noisy.device)
        relaxed = (noisy / self.temperature).softmax(dim=-1)
        wanted = verdict.gradient.to(noisy.device) @ self._embeddings.to(noisy.device).T
        slope: Tensor = relaxed * (wanted - (relaxed * wanted).sum(dim=-1, keepdim=True)) / self.temperature
        return slope


def _judge(guard: GuardModel, tokenizer: PreTrainedTokenizerBase, prompt: str, reply: str) -> _JudgedReply | None:
    """Return None for a reply that cannot be judged."""
    if not reply:
        return None
    tokens, start = tokenize_reply(tokenizer, prompt, reply)
    verdict = judge_reply(guard, prompt, reply, tokens[start:])
    if verdict is None:
        return None
    ids = [token.id for token in tokens]
    return _JudgedReply(TokenizedExample(ids, [IGNORED_LABEL] * start + ids[start:]), verdict)


def _report(asked: int, verdicts: Sequence[GuardVerdict], guard: GuardModel) -> None:
    """Say what the score does not rest on.

    Raises:
        ValueError: It would rest on nothing.
    """
    if not verdicts:
        raise ValueError(
            f"`guard` expected to judge at least one of {asked} replies but all are empty or longer than the "
            f"{guard.max_length} tokens it takes. Check the model's replies, or lower `max_new_tokens`."
        )
    if len(verdicts) < asked:
        warnings.warn(
            f"{asked - len(verdicts)} of {asked} replies are left out of the guard-judged score: they are empty, or "
            "too long for the guard.",
            stacklevel=3,
        )
    silent = sum(not verdict.share >= _SMALLEST_SHARE for verdict in verdicts)
    if silent:
        warnings.warn(
            f"On {silent} of {len(verdicts)} replies the guard gives its answers together less than "
            f"{_SMALLEST_SHARE:.0%} probability: it is about to say something else. Check `convention`.",
            stacklevel=3,
        )
