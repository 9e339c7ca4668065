# SPDX-License-Identifier: Apache-2.0
"""How a guard's verdict changes with each token of a reply, in the vocabulary of the model that wrote it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_safety.language.alignment import align_tokens, find_run
from lightning_safety.language.guard_model import GuardModel
from lightning_safety.language.guards import tokenize_judgement
from lightning_safety.language.likelihood import forward_arguments, output_head
from lightning_safety.language.modes import evaluation_mode
from lightning_safety.language.plain_text import Token
from lightning_safety.language.vocabulary_map import same_vocabulary, vocabulary_map, vocabulary_size

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class GuardVerdict(NamedTuple):
    """What a guard says of a reply.

    Attributes:
        score: log P(harmless) − log P(harmful), in nats.
        share: The probability that the guard gives any of its answers at all.
        gradient: ∂score / ∂(its input embeddings), dealt out to the model's tokens by the characters they share.
            float32 [reply tokens, hidden], on the CPU.
    """

    score: float
    share: float
    gradient: Tensor


def judge_replies(
    guard: GuardModel,
    conversations: Sequence[tuple[str, str]],
    replies: Sequence[Sequence[Token]],
    *,
    same: bool,
) -> list[GuardVerdict | None]:
    """Ask a guard about a batch of replies, and how its answers change with each of their tokens.

    Args:
        guard: Its parameters take no gradient.
        conversations: What the user said and what the model replied.
        replies: The tokens of each reply in the model's tokenizer, with spans from its beginning.
        same: Whether guard and model have one vocabulary: then tokens are aligned one by one where they are the same.

    Returns:
        None where the question is too long for the guard.
    """
    verdicts: list[GuardVerdict | None] = [None] * len(replies)
    questions = [tokenize_judgement(guard.tokenizer, guard.convention, *pair) for pair in conversations]
    short = [n for n, question in enumerate(questions) if guard.max_length is None or len(question) <= guard.max_length]
    if not short:
        return verdicts
    longest = max(len(questions[number]) for number in short)
    # On the left: so that all answers come at the last position.
    padding = [longest - len(questions[number]) for number in short]
    ids = [[0] * pad + [token.id for token in questions[number]] for pad, number in zip(padding, short, strict=True)]
    mask = torch.ones(len(short), longest, dtype=torch.int64)
    for row, pad in enumerate(padding):
        mask[row, :pad] = 0
    mask = mask.to(guard.device)
    with evaluation_mode(guard.model), _frozen(guard.model), torch.enable_grad():
        embedded = input_embeddings(guard.model)(torch.tensor(ids, device=guard.device)).detach().requires_grad_(True)
        margins, shares = answer_margins(guard, embedded, mask)
        (gradients,) = torch.autograd.grad(margins.sum(), embedded)
    for row, (pad, number) in enumerate(zip(padding, short, strict=True)):
        gradient = gradients[row, pad:].cpu().float()
        dealt = _deal(questions[number], replies[number], same=same).T @ gradient
        verdicts[number] = GuardVerdict(float(margins[row].detach()), float(shares[row]), dealt)
    return verdicts


def answer_margins(guard: GuardModel, embedded: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return scores and shares, both [batch], after questions given as input embeddings [batch, length, hidden]."""
    options = forward_arguments(guard.model, mask)
    if "logits_to_keep" in inspect.signature(guard.model.forward).parameters:
        # No row of [vocabulary] logits but the one that is read.
        options["logits_to_keep"] = 1
    output = guard.model(inputs_embeds=embedded, **options)
    return guard.answer_margin(output.logits[:, -1])


def _deal(question: Sequence[Token], reply: Sequence[Token], *, same: bool) -> Tensor:
    """Return how the question's tokens are dealt out to those of the reply. float32 [question, reply]."""
    place = find_run(question, reply) if same else None
    if place is None:
        return align_tokens(question, reply)
    dealt = torch.zeros(len(question), len(reply))
    dealt[place : place + len(reply)] = torch.eye(len(reply))
    return dealt


def token_embeddings(guard: GuardModel, tokenizer: PreTrainedTokenizerBase, size: int) -> Tensor:
    """Return the guard's input embedding of each token of the model.

    Where the vocabularies differ, a token that the guard has too gets the guard's embedding of it. Another one gets the
    mean of those of the guard's tokens that hold its text, each weighed by its share (`vocabulary_map`): not their sum,
    which for a syllable of thousands of words is thousands of times as long as any embedding. A token that none holds,
    or that only fills up the model's vocabulary, gets the mean of all, which speaks neither for it nor against it.

    Args:
        guard: The guard.
        tokenizer: The model's.
        size: Tokens that the model predicts, those included that its tokenizer does not have.

    Returns:
        float32 [size, hidden], on the CPU.
    """
    module = input_embeddings(guard.model)
    rows = min(vocabulary_size(guard.tokenizer), module.num_embeddings)
    with torch.no_grad():
        # Through the module: some scale what they look up.
        table: Tensor = module(torch.arange(rows, device=guard.device)).cpu().float()
    found: Tensor = table.mean(dim=0).repeat(size, 1)
    if same_vocabulary(guard.tokenizer, tokenizer):
        rows = min(rows, size)
        found[:rows] = table[:rows]
        return found
    shares = vocabulary_map(guard.tokenizer, tokenizer)
    (sources, targets), values = shares.indices(), shares.values()
    whole = torch.zeros(shares.shape[1], dtype=torch.bool)
    whole[targets[values == 1]] = True
    # Of a token that the guard has, its parts in other tokens do not count.
    kept = ((values == 1) | ~whole[targets]) & (sources < rows) & (targets < size)
    indices = torch.stack([targets[kept], sources[kept]])
    carried = torch.sparse_coo_tensor(indices, values[kept], (size, rows), check_invariants=True)
    weight = torch.sparse.sum(carried, dim=1).to_dense()
    held = weight.nonzero().squeeze(1)
    found[held] = torch.sparse.mm(carried, table)[held] / weight[held, None]
    return found


def input_embeddings(model: nn.Module) -> nn.Embedding:
    """Return what turns tokens into vectors.

    Raises:
        TypeError: The model does not say.
    """
    getter: Any = getattr(model, "get_input_embeddings", None)
    module = getter() if callable(getter) else None
    if not isinstance(module, nn.Embedding):
        raise TypeError(
            f"A causal language model with an `nn.Embedding` for its tokens expected but got {type(model).__name__} "
            f"with {type(module).__name__}."
        )
    return module


def predicted_tokens(model: nn.Module) -> int:
    """Return how many tokens a model chooses from."""
    weight = getattr(output_head(model), "weight", None)
    return len(weight) if isinstance(weight, Tensor) else input_embeddings(model).num_embeddings


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Let no parameter take a gradient, nor the graph keep what one would need."""
    required = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in required:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in required:
            parameter.requires_grad_(True)
