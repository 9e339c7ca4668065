# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch

from lightning_safety.language import generate_replies, likelihood, response_log_probabilities
from lightning_safety.language.prefix import SharedPrefix, common_prefix_length, compute_shared_prefix
from tests.tiny import make_tiny_model

NOTHING = SharedPrefix(0, None)


def make_batch(rows: int = 3, shared: int = 12, length: int = 20) -> dict[str, torch.Tensor]:
    """Random rows with a common beginning, the second one shorter, labels on the last five tokens of each."""
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(3, 500, (rows, length), generator=generator)
    input_ids[:, :shared] = input_ids[:1, :shared]
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1:2, -2:] = 0
    labels = torch.full_like(input_ids, -100)
    for row, end in enumerate(attention_mask.sum(dim=1).tolist()):
        labels[row, end - 5 : end] = input_ids[row, end - 5 : end]
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def share_nothing(*_, **__):
    return NOTHING


def test_values_and_gradients_are_those_without_sharing(monkeypatch):
    model, batch = make_tiny_model(), make_batch()
    assert compute_shared_prefix(model, batch["input_ids"], batch["attention_mask"]).length == 12
    results = []
    for replacement in (None, share_nothing):
        if replacement:
            monkeypatch.setattr(likelihood, "compute_shared_prefix", replacement)
        sums, counts = response_log_probabilities(model, batch)
        gradients = torch.autograd.grad(sums.sum(), list(model.parameters()))
        results.append((sums, counts, gradients))
    (sums, counts, gradients), (expected, expected_counts, expected_gradients) = results
    torch.testing.assert_close(sums, expected, rtol=1e-6, atol=1e-5)
    assert torch.equal(counts, expected_counts)
    for gradient, reference in zip(gradients, expected_gradients, strict=True):
        assert (gradient - reference).norm() <= 1e-5 * reference.norm()


def test_labels_inside_of_the_common_beginning_are_counted(monkeypatch):
    model, batch = make_tiny_model(), make_batch(shared=18)
    sums, _ = response_log_probabilities(model, batch)
    monkeypatch.setattr(likelihood, "compute_shared_prefix", share_nothing)
    torch.testing.assert_close(sums, response_log_probabilities(model, batch)[0], rtol=1e-6, atol=1e-5)


def test_replies_are_those_without_sharing(tiny_tokenizer, monkeypatch):
    model = make_tiny_model(tie_word_embeddings=False)
    prompts = ["How do I bake bread?", "How do I?", "Name three rivers in Asia, please.", "How"]
    shared = generate_replies(model, tiny_tokenizer, prompts, max_new_tokens=12)
    monkeypatch.setattr("lightning_safety.language.generation.compute_shared_prefix", share_nothing)
    assert shared == generate_replies(model, tiny_tokenizer, prompts, max_new_tokens=12)
    assert any(shared)


@pytest.mark.parametrize(
    "change",
    [
        {"rows": 1},
        {"shared": 4},
    ],
)
def test_too_little_is_not_shared(change):
    batch = make_batch(**change)
    assert compute_shared_prefix(make_tiny_model(), batch["input_ids"], batch["attention_mask"]) == NOTHING


def test_padding_on_the_left_is_not_shared():
    batch = make_batch()
    batch["attention_mask"][0, 0] = 0
    assert compute_shared_prefix(make_tiny_model(), batch["input_ids"], batch["attention_mask"]) == NOTHING


def test_dropout_and_checkpointing_in_training_are_not_shared():
    batch = make_batch()
    arguments = (batch["input_ids"], batch["attention_mask"])
    dropping = make_tiny_model(attention_dropout=0.1)
    assert compute_shared_prefix(dropping, *arguments).length == 12
    assert compute_shared_prefix(dropping.train(), *arguments) == NOTHING
    checkpointing = make_tiny_model().train()
    assert compute_shared_prefix(checkpointing, *arguments).length == 12
    checkpointing.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert compute_shared_prefix(checkpointing, *arguments) == NOTHING


def test_a_sliding_window_is_not_shared():
    from transformers import MistralConfig, MistralForCausalLM

    settings = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = MistralForCausalLM(
        MistralConfig(vocab_size=512, num_key_value_heads=2, sliding_window=4, **settings)
    ).eval()
    batch = make_batch()
    assert compute_shared_prefix(model, batch["input_ids"], batch["attention_mask"]) == NOTHING


def test_one_token_of_the_shortest_row_remains():
    same = torch.tensor([[5, 6, 7, 0], [5, 6, 7, 8]])
    assert common_prefix_length(same, torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])) == 2
    assert common_prefix_length(same[:1], torch.ones(1, 4)) == 0


def test_linear_attention_is_not_shared():
    """Its state is no cache of keys and values; this model refuses one."""
    from transformers import MiniMaxConfig, MiniMaxForCausalLM

    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    config = MiniMaxConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
        num_local_experts=2,
        **heads,
    )
    batch = make_batch()
    shared = compute_shared_prefix(MiniMaxForCausalLM(config).eval(), batch["input_ids"], batch["attention_mask"])
    assert shared == NOTHING
