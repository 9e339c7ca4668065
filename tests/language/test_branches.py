# SPDX-License-Identifier: Apache-2.0
"""Rows merged to one are as likely as alone, with the same gradients, in every family that can have them so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from lightning_safety.data import TokenizedExample, pad_batch
from lightning_safety.language import branches, response_log_probabilities
from lightning_safety.language.branches import (
    packed_log_probabilities,
    packed_tokens_run,
    paired_log_probabilities,
    paired_tokens_run,
)
from tests.quantized import make_quantized_model
from tests.scoring.mixtures import CONFIGS, make_mixture
from tests.tiny import make_tiny_model

DENSE = ("cohere", "gemma", "gemma3_text", "glm", "gpt2", "gpt_neo", "gpt_neox", "granite", "mistral", "olmo2", "opt")
DENSE += ("falcon", "phi", "qwen2", "qwen3", "stablelm", "starcoder2", "bloom", "mamba")


def make_pairs(count: int = 3, shared: int = 10, seed: int = 0) -> dict[str, Tensor]:
    """Prompts and answers of random lengths; the prompts begin alike."""
    generator = torch.Generator().manual_seed(seed)

    def draw(length: int) -> list[int]:
        return torch.randint(3, 500, (length,), generator=generator).tolist()

    begun = draw(shared)
    prompts = [begun + draw(3 + 4 * number) for number in range(count)]
    rows = []
    for length in (6, 2):
        for number, prompt in enumerate(prompts):
            answer = draw(length + number)
            rows.append(TokenizedExample(prompt + answer, [-100] * len(prompt) + answer))
    return pad_batch(rows, pad_token_id=0)


def make_dense(family: str) -> Any:
    known = CONFIG_MAPPING[family]()
    sizes = {"vocab_size": 512, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    more = {"intermediate_size": 24, "num_key_value_heads": 2, "head_dim": 8, "ffn_dim": 24, "word_embed_proj_dim": 16}
    sizes |= {name: value for name, value in more.items() if hasattr(known, name)}
    if family == "falcon":
        del sizes["head_dim"]
    if family == "gpt_neo":
        sizes |= {"attention_types": [[["global", "local"], 1]], "window_size": 4}
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        sizes[name] = 0
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**sizes)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(std=0.3)
    return model


def assert_same(model: Any, batch: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    for merged in (paired_log_probabilities, packed_log_probabilities):
        assert_same_as_alone(merged, model, batch, tolerance)


def assert_same_as_alone(merged: Any, model: Any, batch: dict[str, Tensor], tolerance: float) -> None:
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    found, expected = (function(model, batch) for function in (merged, response_log_probabilities))
    torch.testing.assert_close(found[0], expected[0], rtol=tolerance, atol=tolerance)
    assert torch.equal(found[1], expected[1])
    weights = torch.linspace(-1, 1, len(found[0]))
    gradients = [
        torch.autograd.grad((values[0] * weights).sum(), trained, allow_unused=True) for values in (found, expected)
    ]
    for gradient, reference in zip(*gradients, strict=True):
        if reference is not None:
            assert (gradient - reference).norm() <= 10 * tolerance * reference.norm() + 2e-6


@pytest.mark.parametrize("shared", [0, 10])
@pytest.mark.parametrize("kind", ["tiny", "wide", "double", "nf4"])
def test_values_and_gradients_are_those_of_two_rows(kind: str, shared: int) -> None:
    model = {
        "tiny": make_tiny_model,
        "wide": lambda: make_tiny_model(initializer_range=0.3),
        "double": lambda: make_tiny_model(initializer_range=0.3).double(),
        "nf4": make_quantized_model,
    }[kind]()
    assert branches._can_branch(model)
    # Rotary embeddings are float32 in float64 models too.
    for count in (1, 3):
        assert_same(model, make_pairs(count, shared), 1e-6 if kind == "double" else 1e-5)


@pytest.mark.parametrize("family", DENSE)
def test_dense_families(family: str) -> None:
    model = make_dense(family)
    assert branches._can_branch(model) == (family not in {"bloom", "gemma3_text", "gpt_neo", "mamba", "mistral"})
    assert_same(model, make_pairs())


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_mixtures(family: str) -> None:
    model = make_mixture(family)
    if family in {"mixtral", "olmoe", "qwen3_moe"}:
        assert branches._can_branch(model)
    if family in {"gpt_oss", "jamba", "lfm2_moe", "minimax", "qwen3_next", "nemotron_h"}:
        assert not branches._can_branch(model)
    assert_same(model, make_pairs())


def test_prompts_are_run_once() -> None:
    model, batch = make_tiny_model(), make_pairs()
    seen: list[int] = []
    handle = model.model.layers[0].register_forward_hook(
        lambda _, inputs, output: seen.append(inputs[0].shape[:2].numel())
    )
    paired_log_probabilities(model, batch)
    handle.remove()
    # What all begin with, and what is left of three rows: the longest has 11 tokens of its own, and 8 and 4 answered.
    assert seen == [10, 3 * (11 + 8 + 4)]
    assert sum(seen) == paired_tokens_run(model, batch).tokens
    assert paired_tokens_run(model, batch).shared


@pytest.mark.parametrize("rows", [1, 5])
def test_rows_that_share_their_beginning_only_are_one_row(rows: int) -> None:
    model = make_tiny_model(initializer_range=0.3)
    batch = {name: values[:rows] for name, values in make_pairs(count=5).items()}
    alone = batch["attention_mask"].sum(dim=1)
    seen: list[torch.Size] = []
    handle = model.model.layers[0].register_forward_hook(lambda _, inputs, output: seen.append(inputs[0].shape[:2]))
    packed_log_probabilities(model, batch)
    handle.remove()
    begun = int(alone[0]) - 6 if rows == 1 else 10
    assert seen == [(1, begun + int((alone - begun).sum()))]
    assert packed_tokens_run(model, batch) == (seen[0].numel(), False)
    assert_same_as_alone(packed_log_probabilities, model, batch, 1e-5)


def shift(batch: dict[str, Tensor]) -> None:
    """Pad on the left."""
    for name, values in batch.items():
        batch[name] = torch.cat([torch.full_like(values[:, :1], -100 if name == "labels" else 0), values], dim=1)


def unlabel(batch: dict[str, Tensor]) -> None:
    batch["labels"][1] = -100


@pytest.mark.parametrize("change", [shift, unlabel])
def test_rows_that_cannot_be_merged_are_run_one_by_one(change: Any) -> None:
    model, batch = make_tiny_model(), make_pairs()
    change(batch)
    assert branches._merge(batch, [range(6)]) is None
    assert_same(model, batch)


def test_pairs_whose_prompts_differ() -> None:
    model, batch = make_tiny_model(initializer_range=0.3), make_pairs()
    batch["input_ids"][0, 3] += 1
    merged = branches._merge(batch, [range(6)])
    assert merged is not None
    assert merged.starts == [3]
    assert_same(model, batch)


def test_rows_that_begin_with_nothing_in_common() -> None:
    model, batch = make_tiny_model(), make_pairs(shared=0)
    assert branches._merge(batch, [range(6)]) is None
    assert_same(model, batch)


@pytest.mark.parametrize("make", [lambda: make_tiny_model(attn_implementation="eager"), make_tiny_model])
def test_models_that_cannot_are_run_row_by_row(make: Any) -> None:
    model = make()
    if model.config._attn_implementation == "sdpa":
        model.config.output_router_logits = True
    assert not branches._can_branch(model)
    assert_same(model, make_pairs())
