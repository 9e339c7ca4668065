# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import functional

from lightning_safety.data import TokenizedExample, pad_batch
from lightning_safety.training.loss import ResponsePredictions, predict_responses, response_loss, retention_divergence
from tests.tiny import make_tiny_model


def make_batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for prompt, response in ((5, 3), (9, 6), (7, 1)):
        tokens = torch.randint(3, 500, (prompt + response,), generator=generator).tolist()
        rows.append(TokenizedExample(tokens, [-100] * prompt + tokens[prompt:]))
    return {**pad_batch(rows, pad_token_id=0), "retention": torch.tensor([False, True, True])}


def test_loss_over_tokens_is_that_of_transformers(tiny_model: Any) -> None:
    batch = make_batch()
    expected = tiny_model(**{name: value for name, value in batch.items() if name != "retention"}).loss
    torch.testing.assert_close(response_loss(predict_responses(tiny_model, batch)).value, expected)


def test_loss_over_examples_is_the_mean_of_single_losses(tiny_model: Any) -> None:
    batch = make_batch()
    single = [
        response_loss(
            predict_responses(tiny_model, {name: value[row : row + 1] for name, value in batch.items()})
        ).value
        for row in range(3)
    ]
    torch.testing.assert_close(response_loss(predict_responses(tiny_model, batch), "example").value, sum(single) / 3)


@pytest.mark.parametrize("average", ["token", "example"])
def test_a_row_of_weight_three_counts_as_three_rows(tiny_model: Any, average: str) -> None:
    batch = make_batch()
    weighted = response_loss(predict_responses(tiny_model, batch), average, torch.tensor([1.0, 3.0, 1.0])).value
    repeated = {name: value[[0, 1, 1, 1, 2]] for name, value in batch.items()}
    torch.testing.assert_close(weighted, response_loss(predict_responses(tiny_model, repeated), average).value)


@pytest.mark.parametrize("average", ["token", "example"])
def test_an_unlikely_row_counts_as_the_probability_of_everything_else(tiny_model: Any, average: str) -> None:
    batch = make_batch()
    single = [
        response_loss(predict_responses(tiny_model, {name: value[row : row + 1] for name, value in batch.items()}))
        for row in range(3)
    ]
    # The probability of the row's tokens is that of a sequence.
    rest = [-torch.log(1 - torch.exp(-one.total.double())).float() for one in single]
    losses = torch.stack([single[0].value, rest[1], rest[2]])
    counts = torch.tensor([3.0, 6.0, 1.0]) if average == "token" else torch.ones(3)
    predictions = predict_responses(tiny_model, unlikely_in(batch, [False, True, True]))
    found = response_loss(predictions, average).value
    torch.testing.assert_close(found, (losses * counts).sum() / counts.sum())
    weights = torch.tensor([1.0, 1.0, 4.0])
    weighted = response_loss(predictions, average, weights).value
    torch.testing.assert_close(weighted, (losses * counts * weights).sum() / (counts * weights).sum())


def unlikely_in(batch: dict[str, torch.Tensor], rows: list[bool]) -> dict[str, torch.Tensor]:
    """What `InstructionDataModule` makes of rows that must not be said."""
    avoided = torch.tensor(rows).unsqueeze(1)
    labels = batch["labels"]
    return {**batch, "labels": labels.masked_fill(avoided, -100), "unlikely": labels.masked_fill(~avoided, -100)}


@pytest.mark.parametrize(("margin", "loss", "push"), [(40.0, 40.0, 1.0), (0.0, math.log(2), 0.5), (-40.0, 0.0, 0.0)])
def test_what_is_most_likely_is_pushed_hardest_and_what_is_not_said_not_at_all(
    margin: float, loss: float, push: float
) -> None:
    logits = torch.tensor([[margin, 0.0]], requires_grad=True)
    predictions = ResponsePredictions(
        logits.log_softmax(-1), torch.tensor([0]), torch.tensor([1]), torch.tensor([True])
    )
    found = response_loss(predictions).value
    found.backward()
    assert found.item() == pytest.approx(loss, abs=1e-5)
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, torch.tensor([[push, -push]]))


def test_gradient_is_that_of_transformers(tiny_model: Any) -> None:
    batch = make_batch()
    tiny_model(**{name: value for name, value in batch.items() if name != "retention"}).loss.backward()
    expected = {name: weight.grad for name, weight in tiny_model.named_parameters()}
    tiny_model.zero_grad()
    response_loss(predict_responses(tiny_model, batch)).value.backward()
    for name, weight in tiny_model.named_parameters():
        torch.testing.assert_close(weight.grad, expected[name], atol=1e-6, rtol=1e-4)


def test_padding_and_prompt_do_not_matter(tiny_model: Any) -> None:
    batch = make_batch()
    changed = {**batch, "input_ids": batch["input_ids"].where(batch["attention_mask"] == 1, 77)}
    assert torch.equal(
        response_loss(predict_responses(tiny_model, batch)).value,
        response_loss(predict_responses(tiny_model, changed)).value,
    )


def test_nothing_to_learn_is_an_error(tiny_model: Any) -> None:
    batch = make_batch()
    with pytest.raises(ValueError, match="`labels` expected to hold at least one learned token"):
        predict_responses(tiny_model, {**batch, "labels": torch.full_like(batch["labels"], -100)})


def test_divergence_is_of_the_retention_rows_from_the_start_model(tiny_model: Any) -> None:
    batch, start = make_batch(), make_tiny_model(seed=1)
    found = retention_divergence(predict_responses(tiny_model, batch), start, batch).value
    places = (batch["labels"][1:, 1:] != -100).nonzero()
    now, then = (
        model(batch["input_ids"][1:], batch["attention_mask"][1:]).logits[places[:, 0], places[:, 1]].log_softmax(-1)
        for model in (tiny_model, start)
    )
    torch.testing.assert_close(found, (then.exp() * (then - now)).sum(dim=-1).mean())
    found.backward()
    assert all(weight.grad is None for weight in start.parameters())
    assert functional.relu(found) > 0


def test_divergence_from_itself_is_zero(tiny_model: Any) -> None:
    batch = make_batch()
    assert retention_divergence(predict_responses(tiny_model, batch), tiny_model, batch).value.abs() < 1e-5


def test_divergence_without_retention_rows_is_zero(tiny_model: Any) -> None:
    batch = {**make_batch(), "retention": torch.zeros(3, dtype=torch.bool)}
    assert retention_divergence(predict_responses(tiny_model, batch), make_tiny_model(seed=1), batch).value == 0
    del batch["retention"]
    with pytest.raises(ValueError, match="Add `retention: true` to a source"):
        retention_divergence(predict_responses(tiny_model, batch), tiny_model, batch)
