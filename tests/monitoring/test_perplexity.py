# SPDX-License-Identifier: Apache-2.0
"""Perplexity against a plain loop, and that it leaves no trace."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from lightning_safety.data import Example
from lightning_safety.language import encode_example
from lightning_safety.monitoring import perplexity
from tests.tiny import make_tiny_model

EXAMPLES = [Example(f"Say {word}.", f"{word} " * (3 + 5 * index % 11)) for index, word in enumerate("abcdefghij")]


def _losses(model: nn.Module, tokenizer: Any, *, end_turn: bool) -> list[torch.Tensor]:
    """Negative log-likelihoods of each response's tokens, one example at a time and without any of our shortcuts."""
    found = []
    for example in EXAMPLES:
        row = encode_example(tokenizer, example.prompt, example.response or "", end_turn=end_turn)
        with torch.no_grad():
            log_probabilities = model(torch.tensor([row.input_ids])).logits[0].double().log_softmax(-1)
        learned = [place for place, label in enumerate(row.labels) if label != -100]
        found.append(torch.stack([-log_probabilities[place - 1, row.labels[place]] for place in learned]))
    return found


@pytest.mark.parametrize("end_turn", [True, False])
def test_equals_a_plain_loop(tiny_model: Any, tiny_tokenizer: Any, end_turn: bool) -> None:
    losses = torch.cat(_losses(tiny_model, tiny_tokenizer, end_turn=end_turn))
    found = perplexity(tiny_model, tiny_tokenizer, EXAMPLES, end_turn=end_turn)
    assert found.value == pytest.approx(losses.mean().exp().item(), rel=1e-5)
    assert (found.tokens, found.examples) == (len(losses), len(EXAMPLES))
    assert found.low < found.value < found.high


def test_an_end_of_turn_is_one_token_an_example(tiny_model: Any, tiny_tokenizer: Any) -> None:
    with_end = perplexity(tiny_model, tiny_tokenizer, EXAMPLES)
    without = perplexity(tiny_model, tiny_tokenizer, EXAMPLES, end_turn=False)
    assert with_end.tokens - without.tokens == len(EXAMPLES)


def test_batch_size_changes_only_rounding_and_the_seed_fixes_the_interval(tiny_model: Any, tiny_tokenizer: Any) -> None:
    first, *others = (perplexity(tiny_model, tiny_tokenizer, EXAMPLES, batch_size=size) for size in (1, 3, 10))
    for other in others:
        assert (other.value, other.low, other.high) == pytest.approx((first.value, first.low, first.high), rel=1e-5)
    again = perplexity(tiny_model, tiny_tokenizer, EXAMPLES, batch_size=1)
    assert again == first
    assert perplexity(tiny_model, tiny_tokenizer, EXAMPLES, batch_size=1, seed=1).low != first.low


def test_interval_covers_what_resampling_examples_gives(tiny_model: Any, tiny_tokenizer: Any) -> None:
    losses = _losses(tiny_model, tiny_tokenizer, end_turn=True)
    generator = torch.Generator().manual_seed(5)
    values = []
    for _ in range(3000):
        drawn = torch.randint(len(losses), (len(losses),), generator=generator).tolist()
        values.append(torch.cat([losses[index] for index in drawn]).mean().exp())
    expected = torch.stack(values).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    found = perplexity(tiny_model, tiny_tokenizer, EXAMPLES)
    width = found.high - found.low
    assert [found.low, found.high] == pytest.approx(expected, abs=0.1 * width)


def test_leaves_no_trace(tiny_tokenizer: Any) -> None:
    model = make_tiny_model(attention_dropout=0.5).train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    first = perplexity(model, tiny_tokenizer, EXAMPLES)
    assert perplexity(model, tiny_tokenizer, EXAMPLES) == first
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_replies_without_a_token_are_left_out(tiny_model: Any, tiny_tokenizer: Any) -> None:
    found = perplexity(tiny_model, tiny_tokenizer, [*EXAMPLES[:3], Example("Say nothing.", "")], end_turn=False)
    assert found.examples == 3
    empty = perplexity(tiny_model, tiny_tokenizer, [Example("Say nothing.", "")], end_turn=False)
    assert math.isnan(empty.value)
    assert (empty.tokens, empty.examples) == (0, 0)
    assert empty.to_dict()["value"] is None


def test_one_example_has_no_interval(tiny_model: Any, tiny_tokenizer: Any) -> None:
    found = perplexity(tiny_model, tiny_tokenizer, EXAMPLES[:1])
    assert found.value > 1
    assert math.isnan(found.low)
    assert math.isnan(found.high)


def test_an_example_without_response_is_an_error(tiny_model: Any, tiny_tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"expected to have a response each but 'Say it\.' has none"):
        perplexity(tiny_model, tiny_tokenizer, [Example("Say it.")])
