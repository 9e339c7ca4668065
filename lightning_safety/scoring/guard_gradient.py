# SPDX-License-Identifier: Apache-2.0
"""How a guard's verdict changes with each token of a reply, in the vocabulary of the model that wrote it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_safety.language.alignment import align_tokens
from lightning_safety.language.guard_model import GuardModel
from lightning_safety.language.guards import tokenize_judgement
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


def judge_reply(guard: GuardModel, prompt: str, reply: str, tokens: Sequence[Token]) -> GuardVerdict | None:
    """Ask a guard about one reply, and how its answer changes with each of the reply's tokens.

    Args:
        guard: Its parameters take no gradient.
        prompt: What the user said.
        reply: What the model replied.
        tokens: The reply's tokens in the model's tokenizer, with spans from its beginning.

    Returns:
        None if the question is too long for the guard.
    """
    question = tokenize_judgement(guard.tokenizer, guard.convention, prompt, reply)
    if guard.max_length is not None and len(question) > guard.max_length:
        return None
    ids = torch.tensor([[token.id for token in question]], device=guard.device)
    with evaluation_mode(guard.model), _frozen(guard.model), torch.enable_grad():
        embedded = input_embeddings(guard.model)(ids).detach().requires_grad_(True)
        margin, share = answer_margin(guard, embedded)
        (gradient,) = torch.autograd.grad(margin, embedded)
    shares = align_tokens(question, tokens)
    return GuardVerdict(float(margin.detach()), float(share), shares.T @ gradient[0].float().cpu())


def answer_margin(guard: GuardModel, embedded: Tensor) -> tuple[Tensor, Tensor]:
    """Return score and share, both scalars, after one question given as input embeddings [1, length, hidden]."""
    accepted = inspect.signature(guard.model.forward).parameters
    # No row of [vocabulary] logits but the one that is read.
    options = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
    output = guard.model(inputs_embeds=embedded, use_cache=False, **options)
    margin, share = guard.answer_margin(output.logits[:, -1])
    return margin[0], share[0]


def token_embeddings(guard: GuardModel, tokenizer: PreTrainedTokenizerBase, size: int) -> Tensor:
    """Return the guard's input embedding of each token of the model.

    Where the vocabularies differ, a token's embedding is the mean of those of the guard's tokens that hold its text,
    each weighed by its share (`vocabulary_map`). A token that none holds, or that only fills up the model's vocabulary,
    gets the mean of all, which speaks neither for it nor against it.

    Args:
        guard: The guard.
        tokenizer: The model's.
        size: Tokens that the model predicts, those included that its tokenizer does not have.

    Returns:
        float32 [size, hidden], on the CPU.
    """
    module = input_embeddings(guard.model)
    with torch.no_grad():
        # Through the module: some scale what they look up.
        table: Tensor = module(torch.arange(vocabulary_size(guard.tokenizer), device=guard.device)).float().cpu()
    found = table.mean(dim=0).repeat(size, 1)
    if same_vocabulary(guard.tokenizer, tokenizer):
        found[: len(table)] = table
        return found
    shares = vocabulary_map(guard.tokenizer, tokenizer)
    weight = torch.sparse.sum(shares, dim=0).to_dense()
    held = weight.nonzero().squeeze(1)
    found[held] = torch.sparse.mm(shares.T, table)[held] / weight[held, None]
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
