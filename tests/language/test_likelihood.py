# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities: equal to the plain computation, at less cost."""

from __future__ import annotations

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel

from lightning_safety.data import TokenizedExample, pad_batch
from lightning_safety.language import response_log_probabilities
from tests.tiny import make_tiny_model

ROWS = [
    TokenizedExample([5, 6, 7, 8, 9, 10], [-100, -100, 7, 8, -100, 10]),
    TokenizedExample([11, 12, 13], [-100, 12, -100]),
    TokenizedExample([20, 21, 22, 23], [20, -100, -100, -100]),
]


def plain(model, rows):
    """One row at a time, with all logits."""
    sums = []
    for row in rows:
        log_probabilities = model(torch.tensor([row.input_ids])).logits[0].log_softmax(-1)
        places = [place for place, label in enumerate(row.labels) if place and label != -100]
        sums.append(sum((log_probabilities[place - 1, row.labels[place]] for place in places), torch.zeros(())))
    return torch.stack(sums)


def gemma():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Gemma2Config(vocab_size=64, head_dim=8, num_key_value_heads=1, final_logit_softcapping=0.5, **sizes)
    return Gemma2ForCausalLM(config).eval()


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=32)).eval()


@pytest.mark.parametrize("make", [make_tiny_model, gemma, gpt2])
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_it_equals_the_plain_computation(make, padding_side):
    model = make()
    batch = pad_batch(ROWS, pad_token_id=0, padding_side=padding_side)
    sums, counts = response_log_probabilities(model, batch)
    torch.testing.assert_close(sums, plain(model, ROWS), atol=1e-5, rtol=1e-5)
    assert counts.tolist() == [3, 1, 0]
    assert sums.dtype == counts.dtype == torch.float32
    assert sums[2] == 0


def test_gradients_equal_those_of_the_plain_computation(tiny_model):
    response_log_probabilities(tiny_model, pad_batch(ROWS, pad_token_id=0))[0].sum().backward()
    found = {name: parameter.grad.clone() for name, parameter in tiny_model.named_parameters()}
    tiny_model.zero_grad()
    plain(tiny_model, ROWS).sum().backward()
    for name, parameter in tiny_model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-5, rtol=1e-4)


def test_only_labelled_positions_reach_the_vocabulary(tiny_model):
    seen = []
    handle = tiny_model.lm_head.register_forward_hook(lambda module, arguments, logits: seen.append(logits.shape))
    response_log_probabilities(tiny_model, pad_batch(ROWS, pad_token_id=0))
    handle.remove()
    assert seen == [(1, 4, 512)]


def test_no_hook_is_left_behind_even_after_an_error(tiny_model):
    batch = pad_batch(ROWS, pad_token_id=0)
    response_log_probabilities(tiny_model, batch)
    with pytest.raises(IndexError):
        response_log_probabilities(tiny_model, batch | {"input_ids": batch["input_ids"] + 10_000})
    assert not tiny_model.lm_head._forward_pre_hooks


def test_a_batch_of_one_example(tiny_model):
    for row in ROWS:
        sums, counts = response_log_probabilities(tiny_model, pad_batch([row], pad_token_id=0))
        torch.testing.assert_close(sums, plain(tiny_model, [row]), atol=1e-5, rtol=1e-5)
        assert counts.tolist() == [sum(label != -100 for label in row.labels[1:])]


def test_a_head_that_is_no_module_call_gives_the_same(tiny_model, monkeypatch):
    batch = pad_batch(ROWS, pad_token_id=0)
    expected = response_log_probabilities(tiny_model, batch)[0]
    monkeypatch.setattr(tiny_model, "get_output_embeddings", lambda: None)
    torch.testing.assert_close(response_log_probabilities(tiny_model, batch)[0], expected)


def test_low_precision_is_summed_in_float32_and_double_kept(tiny_model):
    batch = pad_batch(ROWS, pad_token_id=0)
    assert {value.dtype for value in response_log_probabilities(tiny_model.bfloat16(), batch)} == {torch.float32}
    assert {value.dtype for value in response_log_probabilities(tiny_model.double(), batch)} == {torch.float64}


def test_the_model_is_left_as_it_is(tiny_model):
    tiny_model.train()
    tiny_model.config.use_cache = True
    response_log_probabilities(tiny_model, pad_batch(ROWS, pad_token_id=0))
    assert tiny_model.training
    assert tiny_model.config.use_cache is True


def test_a_batch_without_labels_is_refused(tiny_model):
    with pytest.raises(ValueError, match="expected to hold labels but holds input_ids, attention_mask"):
        response_log_probabilities(tiny_model, {"input_ids": torch.ones(1, 2), "attention_mask": torch.ones(1, 2)})
