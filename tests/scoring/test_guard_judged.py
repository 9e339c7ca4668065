# SPDX-License-Identifier: Apache-2.0
"""The guard-judged score: its gradients against finite differences and against one graph through both models."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from lightning_safety.data import Example
from lightning_safety.language import generate_replies, guard_model
from lightning_safety.language.chat import tokenize_reply
from lightning_safety.language.guard_model import GuardModel
from lightning_safety.language.guards import GuardConvention, tokenize_judgement
from lightning_safety.language.plain_text import Token
from lightning_safety.scoring import GuardJudgedSafety, expected_safety_impact, guard_gradient, guard_judged
from lightning_safety.scoring.guard_gradient import answer_margins, input_embeddings, judge_replies, token_embeddings
from tests.language.tokenizers import make_wordpiece_tokenizer
from tests.tiny import make_tiny_model, make_tiny_tokenizer

CONVENTION = GuardConvention(name="own", turns=True, safe=("no",), unsafe=("yes",))
PROMPTS = [Example("How do I pick a lock?"), Example("Why?"), Example("Say something about the river, in short.")]
TEMPERATURE = 0.3


def make_guard(tokenizer: PreTrainedTokenizerFast, seed: int = 1, **overrides: Any) -> GuardModel:
    model = make_tiny_model(seed, hidden_size=48, vocab_size=len(tokenizer), initializer_range=0.1, **overrides)
    return GuardModel(model.double(), tokenizer=tokenizer, convention=CONVENTION)


def make_objective(guard: GuardModel, **options: Any) -> GuardJudgedSafety:
    options = {"noise": False, "max_new_tokens": 9, "temperature": TEMPERATURE, **options}
    return GuardJudgedSafety(guard, PROMPTS, **options)


def make_model() -> LlamaForCausalLM:
    """A random model that says something."""
    return make_tiny_model(initializer_range=0.3)


def weight_gradients(
    model: LlamaForCausalLM, objective: GuardJudgedSafety, tokenizer: PreTrainedTokenizerFast, batch_size: int = 8
) -> Tensor:
    """The gradient of the objective's loss by all weights, as one vector."""
    objective.prepare(model, tokenizer)
    batches = objective.batches(tokenizer, batch_size=batch_size)
    total = sum(batch.examples for batch in batches)
    loss = sum(objective.loss(model, batch) * batch.examples / total for batch in batches)
    assert isinstance(loss, Tensor)
    return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, list(model.parameters()))])


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


def margin(guard: GuardModel, embedded: Tensor) -> Tensor:
    return answer_margins(guard, embedded, torch.ones(embedded.shape[:2], dtype=torch.int64))[0][0]


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


@pytest.mark.parametrize("noise", [False, True])
def test_batch_sizes_change_nothing(tiny_tokenizer: PreTrainedTokenizerFast, noise: bool) -> None:
    model, guard = make_model(), make_guard(make_wordpiece_tokenizer())
    alone, together = (
        weight_gradients(model, make_objective(guard, noise=noise, batch_size=size), tiny_tokenizer, batch_size=size)
        for size in (1, 8)
    )
    assert (alone - together).norm() <= 1e-5 * together.norm()


def test_noise_is_seeded(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model, guard = make_model(), make_guard(tiny_tokenizer)
    first, again, other = (
        weight_gradients(model, make_objective(guard, noise=True, seed=seed), tiny_tokenizer) for seed in (0, 0, 7)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_loss_is_minus_the_mean_score(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model, guard = make_model(), make_guard(tiny_tokenizer)
    objective = make_objective(guard, noise=True)
    objective.prepare(model, tiny_tokenizer)
    (batch,) = objective.batches(tiny_tokenizer, batch_size=8)
    scores = [found.verdict.score for found in objective._judged]
    assert len(set(scores)) == 3
    assert float(objective.loss(model, batch).detach()) == pytest.approx(-sum(scores) / 3, rel=1e-5)


def test_scoring_asks_the_guard_once_and_leaves_it_as_it_was(
    tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    original = guard_gradient.tokenize_judgement
    monkeypatch.setattr(
        guard_gradient, "tokenize_judgement", lambda *values: calls.append(values[2]) or original(*values)
    )
    model, guard = make_model(), make_guard(tiny_tokenizer)
    objective = make_objective(guard)
    first, second = (expected_safety_impact(model, objective, tiny_tokenizer) for _ in range(2))
    assert sorted(calls) == sorted(example.prompt for example in PROMPTS)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(weight.requires_grad and weight.grad is None for weight in guard.model.parameters())


def test_another_state_of_a_model_is_judged_anew(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model, guard = make_model(), make_guard(tiny_tokenizer)
    objective = make_objective(guard)
    weight = model.model.layers[0].mlp.up_proj.weight

    def changed() -> bool:
        before = objective._judged
        objective.prepare(model, tiny_tokenizer)
        return objective._judged is not before

    assert changed()
    assert not changed()
    weight.data[0, 0] += 1  # no version counter sees this
    assert changed()
    weight.grad = torch.ones_like(weight)
    torch.optim.AdamW([weight], lr=0.1, fused=True).step()  # nor this
    assert changed()
    guard.model.lm_head.weight.data *= 2
    assert changed()
    assert not changed()


def test_a_model_that_judges_itself(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_model()
    guard = GuardModel(model, tokenizer=tiny_tokenizer, convention=CONVENTION)
    scores = expected_safety_impact(model, make_objective(guard), tiny_tokenizer)
    assert any(bool(score.any()) for score in scores.values())
    assert all(weight.requires_grad and weight.grad is None for weight in model.parameters())


def test_guard_is_loaded_only_when_asked(
    tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    tiny_tokenizer.save_pretrained(tmp_path)
    make_tiny_model(3).save_pretrained(tmp_path)
    loaded = []
    original = guard_model.load_causal_lm
    monkeypatch.setattr(guard_model, "load_causal_lm", lambda *a, **k: loaded.append(a) or original(*a, **k))
    objective = GuardJudgedSafety(str(tmp_path), PROMPTS, convention="instructed", max_new_tokens=4)
    assert objective.describe()["guard"] == str(tmp_path)
    assert not loaded
    with pytest.warns(UserWarning, match="less than 5% probability"):
        objective.prepare(make_model(), tiny_tokenizer)
    assert len(loaded) == 1


def test_replies_that_cannot_be_judged_are_left_out(
    tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = make_guard(tiny_tokenizer)
    questions = [
        tokenize_judgement(tiny_tokenizer, CONVENTION, example.prompt, reply)
        for example, reply in zip(PROMPTS, ["One.", "", "A very long answer."], strict=True)
    ]
    replies = iter(["One.", "", "A very long answer."])
    monkeypatch.setattr(guard_judged, "generate_replies", lambda *_, **__: list(replies))
    guard.max_length = len(questions[0])
    assert len(questions[2]) > guard.max_length
    objective = make_objective(guard)
    with pytest.warns(UserWarning, match="2 of 3 replies are left out"):
        objective.prepare(make_model(), tiny_tokenizer)
    (batch,) = objective.batches(tiny_tokenizer, batch_size=8)
    assert batch.examples == 1
    monkeypatch.undo()
    guard.max_length = 3
    with pytest.raises(ValueError, match="all are empty, longer than the 3 tokens"):
        make_objective(guard).prepare(make_model(), tiny_tokenizer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "`temperature` expected to be above 0 but got 0.0"),
        ({"max_new_tokens": 0}, "`max_new_tokens` expected"),
        ({"limit": 0}, "`limit` expected"),
    ],
)
def test_bad_arguments(tiny_tokenizer: PreTrainedTokenizerFast, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_objective(make_guard(tiny_tokenizer), **options)


def test_guards_that_cannot_be_asked(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(TypeError, match="pass `GuardModel\\(model, tokenizer"):
        GuardJudgedSafety(make_model())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`convention` expected to be None"):
        make_objective(make_guard(tiny_tokenizer), convention="instructed")
    guard = make_guard(tiny_tokenizer)
    torch.nn.init.constant_(guard.model.model.norm.weight, float("nan"))
    with pytest.raises(ValueError, match="get no finite answer"):
        make_objective(guard).prepare(make_model(), tiny_tokenizer)


def test_batches_before_the_replies(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(RuntimeError, match=r"Call `prepare` with the model first$"):
        make_objective(make_guard(tiny_tokenizer)).batches(tiny_tokenizer, batch_size=2)


def test_description(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    assert make_objective(make_guard(tiny_tokenizer), noise=True, seed=4).describe() == {
        "objective": "GuardJudgedSafety",
        "examples": "3 given examples",
        "guard": "LlamaForCausalLM",
        "convention": "own",
        "max_new_tokens": "9",
        "temperature": "0.3",
        "noise": "seed 4",
    }
