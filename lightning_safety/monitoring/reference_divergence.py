# SPDX-License-Identifier: Apache-2.0
"""How far a model has moved from what it was, where it decides to refuse, as a loss that keeps it there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_safety.data import pad_batch
from lightning_safety.language import evaluation_mode
from lightning_safety.language.branches import packed_logits
from lightning_safety.language.tokenizer import pad_token_id
from lightning_safety.monitoring.own_replies import OwnReplies
from lightning_safety.monitoring.sets import PromptSource
from lightning_safety.progress import track
from lightning_safety.scoring.objective import ObjectiveBatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The likeliest tokens, each by itself; all others count as one. Of a full vocabulary a checkpoint would hold megabytes.
_TOKENS = 64
# No probability counts as less: what is left for the other tokens is a difference of rounded numbers.
_LEAST = 1e-6
_ROWS = 8


class ReferenceDivergence(OwnReplies):
    r"""How far the model's next-token distributions are from those it had, at the first tokens of its own replies.

    S = − mean over examples and tokens of :math:`\mathrm{KL}(p_\mathrm{start} \| p)`, in nats. Examples are those of
    `OwnReplies`: harmful prompts that the model refused, borderline ones that it answered.

    At the start it is zero and so is its gradient: it pulls back what has moved, either way, and leaves alone what has
    not. The likelihood of the replies (`OwnReplies`) never rests, so that a model goes on to refuse more, or less, by
    which examples came last.

    Args:
        harmful: As for `OwnReplies`.
        borderline: As there.
        split: As there.
        prompts: As there.
        answers_per_refusal: As there.
        max_new_tokens: How many tokens of each reply count.

    Raises:
        ValueError: As there.
    """

    def __init__(
        self,
        harmful: PromptSource = "harmful",
        borderline: PromptSource = "borderline",
        *,
        split: str = "train",
        prompts: int = 128,
        answers_per_refusal: int = 2,
        max_new_tokens: int = 4,
    ) -> None:
        super().__init__(
            harmful,
            borderline,
            split=split,
            prompts=prompts,
            answers_per_refusal=answers_per_refusal,
            max_new_tokens=max_new_tokens,
        )
        # By kind: tokens and their log-probabilities at the start, [rows, max_new_tokens, tokens each] both.
        self._reference: dict[str, tuple[Tensor, Tensor]] = {}

    def prepare(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
        """Let the model reply, keep what it did right, and with it what else it could have said."""
        super().prepare(model, tokenizer)
        padding, device = pad_token_id(tokenizer), next(model.parameters()).device
        self._reference = {}
        with evaluation_mode(model, use_cache=False), torch.no_grad():
            for kind, rows in self._rows(tokenizer).items():
                parts = []
                groups = [rows[start : start + _ROWS] for start in range(0, len(rows), _ROWS)]
                for group in track(groups, "Keeping what the model says"):
                    batch = ObjectiveBatch(pad_batch(group, pad_token_id=padding), len(group)).to(device)
                    parts.append(self._distributions(model, batch))
                tokens, values = (torch.cat(each) for each in zip(*parts, strict=True))
                self._reference[kind] = (tokens, values)

    def state_dict(self) -> dict[str, Any]:
        """Return the kept replies, and the distributions at the start."""
        reference = {kind: list(tensors) for kind, tensors in self._reference.items()}
        return {**super().state_dict(), "reference": reference} if reference else super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the replies and distributions of the model as it was, in place of `prepare`."""
        state = dict(state_dict)
        self._reference = {kind: (tokens, values) for kind, (tokens, values) in state.pop("reference", {}).items()}
        super().load_state_dict(state)

    def loss(self, model: nn.Module, batch: ObjectiveBatch) -> Tensor:
        """Return the mean over examples of the mean divergence over their tokens."""
        logits, owners = packed_logits(model, batch.tensors)
        tokens = batch.tensors["reference_tokens"].long()
        places = _places(owners)
        values = _divergences(
            logits, tokens[owners, places], batch.tensors["reference_log_probabilities"][owners, places]
        )
        empty = values.new_zeros(batch.examples)
        sums, counts = empty.index_add(0, owners, values), empty.index_add(0, owners, torch.ones_like(values))
        return (sums / counts).mean()

    def _extra(self, group: Sequence[tuple[str, int]]) -> dict[str, Tensor]:
        if not self._reference:
            raise RuntimeError("`batches` expected distributions at the start but has none. Call `prepare` before.")
        tokens, values = (
            torch.stack([self._reference[kind][which][number] for kind, number in group]) for which in (0, 1)
        )
        return {"reference_tokens": tokens, "reference_log_probabilities": values}

    def _distributions(self, model: nn.Module, batch: ObjectiveBatch) -> tuple[Tensor, Tensor]:
        """Return the likeliest tokens at each label and their log-probabilities, on the CPU."""
        logits, owners = packed_logits(model, batch.tensors)
        likeliest = logits.float().log_softmax(dim=-1).topk(min(_TOKENS, logits.shape[-1]))
        shape = (batch.examples, self.max_new_tokens, likeliest.values.shape[-1])
        tokens, values = torch.zeros(shape, dtype=torch.int32), torch.zeros(shape)
        owners, places = owners.cpu(), _places(owners).cpu()
        tokens[owners, places] = likeliest.indices.cpu().int()
        values[owners, places] = likeliest.values.cpu()
        return tokens, values


def _places(owners: Tensor) -> Tensor:
    """Return the number of each label within its row, for labels that come row after row.

    Example:
        >>> _places(torch.tensor([0, 0, 1, 1, 1, 2]))
        tensor([0, 1, 0, 1, 2, 0])
    """
    counts = torch.bincount(owners)
    firsts = counts.cumsum(0) - counts
    return torch.arange(len(owners), device=owners.device) - firsts[owners]


def _divergences(logits: Tensor, tokens: Tensor, reference: Tensor) -> Tensor:
    """Return KL(reference ‖ now) for each row of logits, of the given tokens and all others as one.

    Args:
        logits: [N, vocabulary].
        tokens: int64 [N, k].
        reference: Their log-probabilities, [N, k].

    Returns:
        Nats, [N], differentiable. float32, or float64 for float64 logits.
    """
    precise = logits if logits.dtype == torch.float64 else logits.float()
    now, reference = precise.log_softmax(dim=-1).gather(1, tokens), reference.to(precise.dtype)
    probability = reference.exp()
    rest = (1 - probability.sum(dim=-1)).clamp(min=_LEAST)
    rest_now = (1 - now.exp().sum(dim=-1)).clamp(min=_LEAST)
    return (probability * (reference - now)).sum(dim=-1) + rest * (rest.log() - rest_now.log())
