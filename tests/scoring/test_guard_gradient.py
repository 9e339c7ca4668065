# SPDX-License-Identifier: Apache-2.0
"""The gradient through a guard, against finite differences and against one graph through both models."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from lightning_safety.language import generate_replies
from lightning_safety.language.chat import tokenize_reply
from lightning_safety.language.guard_model import GuardModel
from lightning_safety.language.guards import tokenize_judgement
from lightning_safety.language.plain_text import Token
from lightning_safety.scoring import guard_gradient, guard_judged
from lightning_safety.scoring.guard_gradient import input_embeddings, judge_replies, token_embeddings
from tests.language.tokenizers import make_wordpiece_tokenizer
from tests.scoring.guard_judged import (
    CONVENTION,
    PROMPTS,
    TEMPERATURE,
    make_guard,
    make_model,
    make_objective,
    margin,
    weight_gradients,
)
from tests.tiny import make_tiny_model, make_tiny_tokenizer


def gumbel(shape: torch.Size, seed: int, number: int) -> Tensor:
    (mixed,) = np.random.SeedSequence([seed, number]).generate_state(1)
    generator = torch.Generator().manual_seed(int(mixed))
    return -torch.empty(shape).exponential_(generator=generator).log()


def reference_gradients(
    model: LlamaForCausalLM, guard: GuardModel, tokenizer: PreTrainedTokenizerFast, noise_seed: int | None = None
) -> Tensor:
    """The same through one graph: relaxed tokens, the guard's embeddings, the guard. The same tokenizer for both."""
    scores = []
    table = guard.model.get_input_embeddings().weight.float()
    for number, example in enumerate(PROMPTS):
        (reply,) = generate_replies(model, tokenizer, [example.prompt], max_new_tokens=9)
        tokens, start = tokenize_reply(tokenizer, example.prompt, reply)
        whole = torch.tensor([[token.id for token in tokens]])
        logits = model(whole).logits[0, start - 1 : -1]
        noise = 0 if noise_seed is None else gumbel(logits.shape, noise_seed, number)
        p = ((logits + noise) / TEMPERATURE).softmax(-1)
        q = torch.nn.functional.one_hot(whole[0, start:], p.shape[-1]) + p - p.detach()
        question = tokenize_judgement(tokenizer, CONVENTION, example.prompt, reply)
        embedded = guard.model.get_input_embeddings()(torch.tensor([[token.id for token in question]]))[0]
        first = next(place for place, token in enumerate(question) if token.start == 0)
        assert [token.id for token in question[first : first + len(q)]] == whole[0, start:].tolist()
        relaxed = torch.cat([embedded[:first], (q @ table).double(), embedded[first + len(q) :]])
        scores.append(margin(guard, relaxed[None]))
    loss = -torch.stack(scores).mean()
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def cosine(first: Tensor, second: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(first.double(), second.double(), dim=0))


@pytest.mark.parametrize("noise_seed", [None, 5])
def test_equals_one_graph_through_both_models(tiny_tokenizer: PreTrainedTokenizerFast, noise_seed: int | None) -> None:
    model, guard = make_model(), make_guard(tiny_tokenizer)
    objective = make_objective(guard, noise=noise_seed is not None, seed=noise_seed or 0)
    found = weight_gradients(model, objective, tiny_tokenizer)
    expected = reference_gradients(model, guard, tiny_tokenizer, noise_seed)
    assert expected.norm() > 1e-3
    assert (found - expected).norm() <= 1e-4 * expected.norm()


def test_path_for_another_vocabulary_agrees_where_it_is_the_same(
    tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, guard = make_model(), make_guard(tiny_tokenizer)
    same = weight_gradients(model, make_objective(guard), tiny_tokenizer)
    asked = []
    for room in (guard_gradient, guard_judged):
        monkeypatch.setattr(room, "same_vocabulary", lambda *_: bool(asked.append(True)))
    monkeypatch.setattr(guard_gradient, "find_run", None)  # by the characters, then
    other = weight_gradients(model, make_objective(guard), tiny_tokenizer)
    assert asked == [True, True]
    assert cosine(same, other) >= 0.99


def characters_shared(question: list[Token], reply: str, tokens: list[Token]) -> Tensor:
    """The part of each of the question's tokens that each of the reply's tokens holds, counted by hand."""
    shares = torch.zeros(len(question), len(tokens))
    for row, token in enumerate(question):
        inside = [place for place in range(token.start, token.end) if 0 <= place < len(reply)]
        held = [place for place in inside if any(other.start <= place < other.end for other in tokens)]
        for place in held:
            owners = [column for column, other in enumerate(tokens) if other.start <= place < other.end]
            for column in owners:
                shares[row, column] += 1 / len(owners) / len(held)
    return shares


@pytest.mark.parametrize("make", [make_tiny_tokenizer, make_wordpiece_tokenizer])
def test_gradient_equals_finite_differences_in_soft_token_space(make: Any) -> None:
    # ∂S/∂q[t, v] of the relaxed token t: the guard's score when the embeddings of what stands for t move a little
    # towards that of v. In this reply every character is a token's whole or a whole token's.
    guard_tokenizer, tokenizer = make(), make_tiny_tokenizer()
    guard = make_guard(guard_tokenizer)
    prompt, reply = PROMPTS[0].prompt, "Sure, here is the whole of that information about harm"
    tokens, start = tokenize_reply(tokenizer, prompt, reply)
    (verdict,) = judge_replies(guard, [(prompt, reply)], [tokens[start:]], same=False)
    assert verdict is not None
    question = tokenize_judgement(guard_tokenizer, CONVENTION, prompt, reply)
    assert "".join(reply[max(0, t.start) : t.end] for t in question if t.end > 0).replace(" ", "") == reply.replace(
        " ", ""
    )
    shares = characters_shared(question, reply, tokens[start:]).double()
    table = token_embeddings(guard, tokenizer, len(tokenizer)).double()
    embedded = input_embeddings(guard.model)(torch.tensor([[token.id for token in question]])).detach()
    # The norms of a Llama compute in float32 whatever its weights are, so the step must not be too small.
    step = 1e-3
    towards = torch.randint(0, len(tokenizer), (len(tokens) - start,), generator=torch.Generator().manual_seed(0))
    expected = []
    for place, token in enumerate(towards.tolist()):
        moved = step * shares[:, place, None] * table[token]
        above, below = (margin(guard, embedded + sign * moved).detach() for sign in (1, -1))
        expected.append((above - below) / (2 * step))
    found = (verdict.gradient.double() * table[towards]).sum(dim=1)
    assert torch.stack(expected).abs().min() > 1e-6
    assert (found - torch.stack(expected)).norm() <= 1e-3 * torch.stack(expected).norm()
    assert verdict.score == pytest.approx(float(margin(guard, embedded).detach()), rel=1e-6)


def test_embeddings_are_the_guards_own_where_it_has_the_token() -> None:
    guard_tokenizer, tokenizer = make_wordpiece_tokenizer(), make_tiny_tokenizer()
    guard = make_guard(guard_tokenizer)
    table = guard.model.get_input_embeddings().weight.float()
    found = token_embeddings(guard, tokenizer, len(tokenizer) + 3)
    ours, theirs = tokenizer.get_vocab(), guard_tokenizer.get_vocab()
    for token, same in (("Ġthat", "that"), ("ing", "##ing")):
        assert torch.allclose(found[ours[token]], table[theirs[same]])
    assert torch.allclose(found[-3:], table.mean(dim=0))  # fills up the vocabulary
    assert torch.allclose(found[ours["<|im_end|>"]], table.mean(dim=0))
    assert found.norm(dim=1).max() <= table.norm(dim=1).max() + 1e-5


def test_vocabularies_larger_or_smaller_than_the_embeddings(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_tiny_model(vocab_size=530, initializer_range=0.3)  # filled up
    longer = copy.deepcopy(tiny_tokenizer)
    longer.add_tokens(["<extra>", "<more>"])  # not resized
    guard = make_guard(tiny_tokenizer)
    guard.tokenizer = longer
    assert weight_gradients(model, make_objective(guard), tiny_tokenizer).norm() > 0
    assert token_embeddings(guard, longer, 512).shape == (512, 48)
