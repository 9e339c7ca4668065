# SPDX-License-Identifier: Apache-2.0
"""The divergence from what a model was: zero at the start, exact, and a pull back from both sides."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_safety.data import Example
from lightning_safety.language import response_logits
from lightning_safety.monitoring import ReferenceDivergence, own_replies, reference_divergence
from tests.tiny import make_tiny_model, make_tiny_tokenizer

TOKENIZER = make_tiny_tokenizer()
REFUSAL = "I'm sorry, but I can't assist with that."
HARMFUL = [Example("harmful one"), Example("harmful two, which is longer")]
BORDERLINE = [Example(f"harmless {number}") for number in range(3)]


@pytest.fixture(autouse=True)
def _scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    def reply(model: Any, tokenizer: Any, prompts: Sequence[str], **_: Any) -> list[str]:
        return [REFUSAL if prompt.startswith("harmful") else "Open it." for prompt in prompts]

    monkeypatch.setattr(own_replies, "generate_replies", reply)


def make_model() -> Any:
    return make_tiny_model(initializer_range=0.3)


def prepared(model: Any, **options: Any) -> ReferenceDivergence:
    objective = ReferenceDivergence(HARMFUL, BORDERLINE, **options)
    objective.prepare(model, TOKENIZER)
    return objective


def loss_of(objective: ReferenceDivergence, model: Any, batch_size: int = 9) -> Tensor:
    batches = objective.batches(TOKENIZER, batch_size=batch_size)
    losses = torch.stack([objective.loss(model, batch) for batch in batches])
    examples = torch.tensor([float(batch.examples) for batch in batches])
    return (losses * examples).sum() / examples.sum()


def moved(model: Any, by: float) -> Any:
    other = copy.deepcopy(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in other.parameters():
            weight.add_(torch.randn_like(weight), alpha=by)
    return other


@pytest.mark.parametrize("tokens", [8, 10_000])
def test_at_the_start_there_is_nothing_to_pull_back(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_divergence, "_TOKENS", tokens)
    model = make_model()
    objective = prepared(model)
    assert abs(float(loss_of(objective, model))) < 1e-5
    norms = []
    for each in (model, moved(model, 0.02)):
        gradients = torch.autograd.grad(loss_of(objective, each), list(each.parameters()))
        norms.append(float(torch.cat([gradient.flatten() for gradient in gradients]).norm()))
    assert norms[0] < 1e-3 * norms[1]


def test_with_all_tokens_it_is_the_divergence_of_the_distributions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_divergence, "_TOKENS", 10_000)
    model = make_model()
    other = moved(model, 0.05)
    objective = prepared(model, max_new_tokens=3)
    (batch,) = objective.batches(TOKENIZER, batch_size=9)
    means = []
    for row in range(batch.examples):
        one = {name: tensor[row : row + 1] for name, tensor in batch.tensors.items()}
        start, now = (response_logits(each, one)[0].log_softmax(-1) for each in (model, other))
        means.append(float((start.exp() * (start - now)).sum(-1).mean()))
    assert float(objective.loss(other, batch)) == pytest.approx(sum(means) / len(means), rel=1e-4)
    assert sum(means) / len(means) > 0.01


def test_of_other_tokens_only_the_sum_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    other = moved(model, 0.05)
    losses = []
    for tokens in (1, 8, 64, 10_000):
        monkeypatch.setattr(reference_divergence, "_TOKENS", tokens)
        losses.append(float(loss_of(prepared(model), other)))
    # Fewer classes can only hide a difference.
    assert losses == sorted(losses)
    assert 0 < losses[0] < losses[-1]


def test_batch_sizes_change_nothing() -> None:
    model = make_model()
    other, objective = moved(model, 0.05), prepared(model)
    with torch.no_grad():
        assert float(loss_of(objective, other, 1)) == pytest.approx(float(loss_of(objective, other, 9)), rel=1e-5)


@pytest.mark.parametrize("sign", [1, -1])
def test_training_on_it_goes_back_from_both_sides(sign: int) -> None:
    model = make_model()
    objective = prepared(model)
    other = moved(model, sign * 0.03)
    before = float(loss_of(objective, other))
    optimizer = torch.optim.Adam(other.parameters(), lr=1e-3)
    for _ in range(60):
        optimizer.zero_grad()
        loss_of(objective, other).backward()
        optimizer.step()
    assert float(loss_of(objective, other)) < 0.2 * before


def test_a_state_takes_the_place_of_preparing() -> None:
    model = make_model()
    objective = prepared(model)
    again = ReferenceDivergence(HARMFUL, BORDERLINE)
    again.load_state_dict(objective.state_dict())
    other = moved(model, 0.05)
    assert torch.equal(loss_of(again, other), loss_of(objective, other))


def test_distributions_come_first() -> None:
    objective = ReferenceDivergence(HARMFUL, BORDERLINE)
    objective.load_state_dict({"harmful": [["a", "b"]], "borderline": [["c", "d"]]})
    with pytest.raises(RuntimeError, match=r"expected distributions at the start but has none\. Call `prepare` before"):
        objective.batches(TOKENIZER, batch_size=2)
