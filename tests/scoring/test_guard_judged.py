# SPDX-License-Identifier: Apache-2.0
"""The guard-judged objective: what it asks, when it asks anew, what it leaves out and refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from lightning_safety.language import guard_model
from lightning_safety.language.guard_model import GuardModel
from lightning_safety.language.guards import tokenize_judgement
from lightning_safety.scoring import GuardJudgedSafety, expected_safety_impact, guard_gradient, guard_judged
from tests.language.tokenizers import make_wordpiece_tokenizer
from tests.scoring.guard_judged import (
    CONVENTION,
    PROMPTS,
    make_guard,
    make_model,
    make_objective,
    weight_gradients,
)
from tests.tiny import make_tiny_model


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
