# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch

from lightning_safety.data import load_prompts
from lightning_safety.language import encode_example
from lightning_safety.monitoring.margin import opening_likelihood
from tests.tiny import make_tiny_model, make_tiny_tokenizer


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_opening_likelihood_is_the_mean_over_the_first_tokens(batch_size: int) -> None:
    """By hand: the log-probabilities of the first tokens of each response, without padding."""
    model, tokenizer = make_tiny_model(), make_tiny_tokenizer()
    examples = load_prompts("harmful", split="monitor", limit=3)
    expected = []
    for example in examples:
        row = encode_example(tokenizer, example.prompt, example.response, end_turn=False)
        places = [place for place, label in enumerate(row.labels) if label != -100][:4]
        logits = model(input_ids=torch.tensor([row.input_ids])).logits[0].log_softmax(-1)
        expected.append(sum(float(logits[place - 1, row.input_ids[place]]) for place in places) / 4)
    model.train()
    found = opening_likelihood(model, tokenizer, examples, tokens=4, batch_size=batch_size)
    assert found == pytest.approx(sum(expected) / 3, abs=1e-5)
    assert model.training
