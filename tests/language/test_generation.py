# SPDX-License-Identifier: Apache-2.0
"""Greedy replies: equal to the plain loop, whatever the batch, and without a trace."""

from __future__ import annotations

import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from lightning_safety.language import encode_prompt, generate_replies
from tests.tiny import make_tiny_model, make_tiny_tokenizer

PROMPTS = ["Hi", "How do I bake bread at home without an oven?", "Tell me a joke.", "Why?", "Hi", "Name three rivers."]


@pytest.fixture
def model():
    """With a head of its own: one that is tied to random embeddings repeats the last token for ever."""
    return make_tiny_model(tie_word_embeddings=False)


def plain(model, tokenizer, prompt, count, stops=(2,)):
    """One token at a time, no cache, no padding."""
    token_ids = encode_prompt(tokenizer, prompt)
    new = []
    with torch.no_grad():
        while len(new) < count:
            new.append(int(model(torch.tensor([token_ids + new])).logits[0, -1].argmax()))
            if new[-1] in stops:
                new.pop()
                break
    return tokenizer.decode(new, skip_special_tokens=True).strip()


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_replies_equal_the_plain_loop_in_the_order_of_the_prompts(model, tiny_tokenizer, batch_size):
    replies = generate_replies(model, tiny_tokenizer, PROMPTS, max_new_tokens=9, batch_size=batch_size)
    assert replies == [plain(model, tiny_tokenizer, prompt, 9) for prompt in PROMPTS]
    assert len(set(replies)) == 5


def test_the_model_s_generation_config_changes_nothing(model, tiny_tokenizer):
    expected = generate_replies(model, tiny_tokenizer, PROMPTS, max_new_tokens=9)
    settings = {"do_sample": True, "temperature": 5.0, "top_p": 0.1, "repetition_penalty": 9.0, "num_beams": 3}
    model.generation_config.update(
        **settings, max_length=5, min_new_tokens=2, suppress_tokens=[1, 4, 5], use_cache=False
    )
    before = model.generation_config
    content = before.to_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert generate_replies(model, tiny_tokenizer, PROMPTS, max_new_tokens=9) == expected
    assert model.generation_config is before
    assert before.to_dict() == content


@pytest.mark.parametrize("place", ["model", "tokenizer", "template"])
def test_a_reply_stops_at_every_kind_of_end(model, place):
    tokenizer = make_tiny_tokenizer()
    prompt = encode_prompt(tokenizer, PROMPTS[1])
    model.generation_config.eos_token_id = None
    new = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt) :].tolist()
    end = next(place for place in range(3, 12) if new[place] not in new[:place])
    if place == "model":
        model.generation_config.eos_token_id = [2, new[end]]
    elif place == "tokenizer":
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(new[end])
    else:
        # Now the model says `<|im_end|>` there, and the template alone calls it an end.
        tokenizer.eos_token = "<|endoftext|>"
        with torch.no_grad():
            model.lm_head.weight[[2, new[end]]] = model.lm_head.weight[[new[end], 2]]
    replies = generate_replies(model, tokenizer, [PROMPTS[1]], max_new_tokens=12)
    assert replies == [tokenizer.decode(new[:end]).strip()]
    assert replies != [tokenizer.decode(new).strip()]


def test_nothing_of_the_model_or_the_random_state_changes(model, tiny_tokenizer):
    model.train()
    model.model.layers[0].eval()
    model.config.use_cache = False
    model.gradient_checkpointing_enable()
    modes = [module.training for module in model.modules()]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    generate_replies(model, tiny_tokenizer, PROMPTS, max_new_tokens=3)
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert [module.training for module in model.modules()] == modes
    assert model.config.use_cache is False
    assert model.is_gradient_checkpointing
    assert tiny_tokenizer.padding_side == "right"
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_dropout_is_off(tiny_tokenizer):
    model = make_tiny_model(attention_dropout=0.9)
    expected = generate_replies(model, tiny_tokenizer, PROMPTS, max_new_tokens=5)
    assert generate_replies(model.train(), tiny_tokenizer, PROMPTS, max_new_tokens=5) == expected


@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_any_gradient_mode_will_do(model, tiny_tokenizer, context):
    expected = generate_replies(model, tiny_tokenizer, ["Hi"], max_new_tokens=3)
    with context():
        assert generate_replies(model, tiny_tokenizer, ["Hi"], max_new_tokens=3) == expected


def test_an_error_while_generating_leaves_the_model_as_it_was(model, tiny_tokenizer, monkeypatch):
    model.train()
    before = model.generation_config
    monkeypatch.setattr(model.lm_head, "forward", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate_replies(model, tiny_tokenizer, ["Hi"])
    assert model.training
    assert model.generation_config is before


def test_bad_input_is_refused(model, tiny_tokenizer):
    with pytest.raises(ValueError, match="at least one prompt"):
        generate_replies(model, tiny_tokenizer, [])
    with pytest.raises(TypeError, match="got a single string"):
        generate_replies(model, tiny_tokenizer, "Hi")
    with pytest.raises(ValueError, match="`max_new_tokens` expected to be at least 1"):
        generate_replies(model, tiny_tokenizer, ["Hi"], max_new_tokens=0)
    with pytest.raises(TypeError, match="that generates but got Linear"):
        generate_replies(nn.Linear(2, 2), tiny_tokenizer, ["Hi"])
    with pytest.raises(ValueError, match=r"context of 512 tokens but with `max_new_tokens=24` this one takes .*'no no"):
        generate_replies(model, tiny_tokenizer, ["Hi", "no " * 400])


def test_under_autocast_frozen_weights_are_cast_once():
    """As autocast keeps the casts of weights that train; of others it would make one for every token."""
    model, tokenizer = make_tiny_model(), make_tiny_tokenizer()
    model.requires_grad_(False)
    seen = set()

    def note(module, arguments):
        seen.add(all(weight.requires_grad for weight in module.parameters()))

    model.register_forward_pre_hook(note)
    with torch.autocast("cpu", torch.bfloat16):
        frozen = generate_replies(model, tokenizer, ["A question?"], max_new_tokens=4)
        assert not any(weight.requires_grad for weight in model.parameters())
        model.requires_grad_(True)
        assert generate_replies(model, tokenizer, ["A question?"], max_new_tokens=4) == frozen
    model.requires_grad_(False)
    assert seen == {True}
    seen.clear()
    generate_replies(model, tokenizer, ["A question?"], max_new_tokens=4)
    assert seen == {False}
