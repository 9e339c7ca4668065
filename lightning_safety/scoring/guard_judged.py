# SPDX-License-Identifier: Apache-2.0
"""The safety score of the paper: what a guard model says of the model's own replies, as a function of its weights."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import ref

import numpy as np
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
from lightning_safety.language.vocabulary_map import check_fast, same_vocabulary
from lightning_safety.processes import from_first, gather, gather_shares, share_of
from lightning_safety.progress import track
from lightning_safety.scoring.guard_gradient import GuardVerdict, judge_replies, predicted_tokens, token_embeddings
from lightning_safety.scoring.objective import ExampleObjective, ObjectiveBatch
from lightning_safety.scoring.shards import is_sharded, passes_of_all

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# Where the guard gives all its answers together less probability than this, it says something else.
_SMALLEST_SHARE = 0.05


class _JudgedReply(NamedTuple):
    number: int  # of the prompt
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
        guard: A `GuardModel`, or the path or hub id of one, which is loaded when it is asked and let go after that.
        examples: Prompts, as for `RefusalLikelihood`; their responses are not used.
        split: As for `RefusalLikelihood`.
        limit: As for `RefusalLikelihood`.
        convention: How the guard is asked, if `guard` is not a `GuardModel` already.
        max_new_tokens: Length of the replies, in tokens.
        temperature: τ.
        noise: Whether Gumbel noise is added.
        seed: Of the noise, which is drawn for each prompt by itself.
        batch_size: Replies generated, and judged, at a time.

    Raises:
        TypeError: `guard` is a model without its tokenizer.
        ValueError: An argument is out of range. From `prepare`: the guard cannot be asked, no reply can be judged, or
            one of the tokenizers does not say which characters a token comes from.
    """

    bounded = False

    def __init__(
        self,
        guard: GuardModel | str | os.PathLike[str],
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
        if not isinstance(guard, GuardModel | str | os.PathLike):
            raise TypeError(
                f"`guard` expected to be a GuardModel, a path or a hub id but got {type(guard).__name__}. For a loaded "
                "model, pass `GuardModel(model, tokenizer=…)`."
            )
        if isinstance(guard, GuardModel) and convention is not None:
            raise ValueError("`convention` expected to be None beside a GuardModel, which has one. Leave it out.")
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
        described = {
            **super().describe(),
            "guard": os.fspath(self.guard) if not isinstance(self.guard, GuardModel) else "",
        }
        convention = self.convention
        if isinstance(self.guard, GuardModel):
            model = self.guard.model
            described["guard"] = str(getattr(model, "name_or_path", "") or type(model).__name__)
            convention = self.guard.convention
        return {
            **described,
            "convention": convention.name if isinstance(convention, GuardConvention) else convention or "by name",
            "max_new_tokens": str(self.max_new_tokens),
            "temperature": str(self.temperature),
            "noise": f"seed {self.seed}" if self.noise else "none",
        }

    def prepare(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
        """Generate the replies and ask the guard, once for each state of both models."""
        self._prepare(model, tokenizer, shared=False)

    def prepare_together(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
        """Share out the generation of the replies, and ask the guard of all of them in each process.

        A model that is sharded over the processes generates all of them in each.
        """
        self._prepare(model, tokenizer, shared=True)

    def _prepare(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, *, shared: bool) -> None:
        judges = [self.guard.model] if isinstance(self.guard, GuardModel) else []
        state = (ref(tokenizer), *(_checksums(one) for one in [model, *judges]))
        known = state == self._prepared_for
        if all(gather(known)) if shared else known:
            return
        self._prepared_for = None
        check_fast(tokenizer, "tokenizer")
        guard = self.guard if isinstance(self.guard, GuardModel) else GuardModel(self.guard, convention=self.convention)
        check_fast(guard.tokenizer, "guard")
        prompts = [example.prompt for example in self.load_examples()]
        with torch.autocast(next(model.parameters()).device.type, enabled=False):
            replies = self._replies(model, tokenizer, prompts, shared=shared)
            self._judged = self._judge(guard, tokenizer, list(zip(prompts, replies, strict=True)))
            _report(len(prompts), [found.verdict for found in self._judged], guard)
            self._embeddings = token_embeddings(guard, tokenizer, predicted_tokens(model))
        self._prepared_for = state

    def _replies(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: list[str], *, shared: bool
    ) -> list[str]:
        options: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "batch_size": self.batch_size}
        if shared and is_sharded(model.parameters()):
            with passes_of_all(model):
                replies = generate_replies(model, tokenizer, prompts, together=True, **options)
            return from_first(replies)
        share = share_of(prompts) if shared else prompts
        # A process may have none.
        replies = generate_replies(model, tokenizer, share, **options) if share else []
        # Each is made in one process: another's may differ by a rounding.
        return gather_shares(replies) if shared else replies

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
        judged = [self._judged[index] for index in tensors.pop("index").tolist()]
        logits, _, counted = response_logits(model, tensors)
        embeddings = self._embeddings.to(logits.device)
        with torch.no_grad():
            parts = torch.split(logits, counted.sum(dim=1).tolist())
            slopes = [self._slope(part, found, embeddings) for part, found in zip(parts, judged, strict=True)]
        # Linear in the logits, with the value and the gradient that S has here: the graph ends where p enters the
        # guard, which has been asked already.
        linear = (logits.float() * torch.cat(slopes)).sum()
        score = sum(found.verdict.score for found in judged)
        loss: Tensor = -(linear - linear.detach() + score) / len(judged)
        return loss

    def _slope(self, logits: Tensor, judged: _JudgedReply, embeddings: Tensor) -> Tensor:
        """Return ∂S/∂logits of one reply's tokens. float32 [reply tokens, vocabulary]."""
        noisy = logits.float()
        if self.noise:
            # On the CPU: the same on every device.
            (seed,) = np.random.SeedSequence([self.seed, judged.number]).generate_state(1)
            generator = torch.Generator().manual_seed(int(seed))
            exponential = torch.empty(logits.shape).exponential_(generator=generator)
            noisy = noisy - exponential.log().to(noisy.device)
        relaxed = (noisy / self.temperature).softmax(dim=-1)
        wanted = judged.verdict.gradient.to(noisy.device) @ embeddings.T
        slope: Tensor = relaxed * (wanted - (relaxed * wanted).sum(dim=-1, keepdim=True)) / self.temperature
        return slope

    def _judge(
        self, guard: GuardModel, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]]
    ) -> list[_JudgedReply]:
        """Return what the guard says, without the replies that cannot be judged."""
        same = same_vocabulary(guard.tokenizer, tokenizer)
        spoken = [number for number, (_, reply) in enumerate(pairs) if reply]
        encoded = {number: tokenize_reply(tokenizer, *pairs[number]) for number in spoken}
        judged = []
        buckets = length_buckets([len(encoded[number][0]) for number in spoken], self.batch_size)
        for bucket in track(buckets, "Asking the guard"):
            numbers = [spoken[place] for place in bucket]
            replies = [tokens[start:] for tokens, start in (encoded[number] for number in numbers)]
            verdicts = judge_replies(guard, [pairs[number] for number in numbers], replies, same=same)
            for number, verdict in zip(numbers, verdicts, strict=True):
                if verdict is not None and math.isfinite(verdict.score) and bool(verdict.gradient.isfinite().all()):
                    tokens, start = encoded[number]
                    ids = [token.id for token in tokens]
                    row = TokenizedExample(ids, [IGNORED_LABEL] * start + ids[start:])
                    judged.append(_JudgedReply(number, row, verdict))
        return sorted(judged, key=lambda found: found.number)


def _checksums(model: nn.Module) -> tuple[object, ...]:
    """Return what tells two states of a model apart: a version counter would miss what an optimizer does in C."""
    return (ref(model), *(float(weight.detach().sum(dtype=torch.float64)) for weight in model.parameters()))


def _report(asked: int, verdicts: Sequence[GuardVerdict], guard: GuardModel) -> None:
    """Say what the score does not rest on.

    Raises:
        ValueError: It would rest on nothing.
    """
    if not verdicts:
        raise ValueError(
            f"`guard` expected to judge at least one of {asked} replies but all are empty, longer than the "
            f"{guard.max_length} tokens it takes, or get no finite answer. Check the model's replies and the guard's "
            "dtype, or lower `max_new_tokens`."
        )
    if len(verdicts) < asked:
        warnings.warn(
            f"{asked - len(verdicts)} of {asked} replies are left out of the guard-judged score: they are empty, "
            "too long for the guard, or get no finite answer.",
            stacklevel=3,
        )
    silent = sum(not verdict.share >= _SMALLEST_SHARE for verdict in verdicts)
    if silent:
        warnings.warn(
            f"On {silent} of {len(verdicts)} replies the guard gives its answers together less than "
            f"{_SMALLEST_SHARE:.0%} probability: it is about to say something else. Check `convention`.",
            stacklevel=3,
        )
