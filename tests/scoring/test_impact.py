# SPDX-License-Identifier: Apache-2.0
"""The impact equals its formula and does not depend on the batch size, the mode or what surrounds the call."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

from lightning_safety.data import load_prompts
from lightning_safety.scoring import (
    RefusalLikelihood,
    RefusalMargin,
    SafetyObjective,
    expected_safety_impact,
    select_top,
)
from tests.scoring.linear import NO_TOKENIZER, Linear, MeanOutput
from tests.tiny import make_tiny_model


@pytest.mark.parametrize("batch_size", [1, 2, 7])
@pytest.mark.parametrize("reduction", ["signed", "absolute"])
@pytest.mark.parametrize("scale", ["std", "magnitude", "none"])
def test_closed_form_on_a_linear_model(scale: Any, reduction: Any, batch_size: int) -> None:
    generator = torch.Generator().manual_seed(1)
    inputs, weights = torch.randn(7, 3, generator=generator), torch.randn(2, generator=generator)
    model = Linear()
    scores = expected_safety_impact(
        model, MeanOutput(inputs, weights), NO_TOKENIZER, batch_size=batch_size, reduction=reduction, scale=scale
    )
    gradients = torch.einsum("o,ni->noi", weights, inputs)
    gradient = gradients.mean(dim=0).abs() if reduction == "signed" else gradients.abs().mean(dim=0)
    weight = model.head.weight.detach()
    factors = {
        "std": ((weight - weight.mean()) ** 2).mean().sqrt(),
        "magnitude": weight.abs(),
        "none": torch.tensor(1.0),
    }
    assert list(scores) == ["head.weight"]
    torch.testing.assert_close(scores["head.weight"], gradient * factors[scale], rtol=1e-5, atol=1e-7)


def test_finite_differences_on_a_language_model(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_tiny_model(initializer_range=0.2).double()
    objective = RefusalMargin(limit=3)
    scores = expected_safety_impact(model, objective, tiny_tokenizer, scale="none")
    batches = objective.batches(tiny_tokenizer, batch_size=2)

    def loss() -> float:
        with torch.no_grad():
            return sum(float(objective.loss(model, batch)) * batch.examples for batch in batches) / 3

    generator = torch.Generator().manual_seed(0)
    for name, score in scores.items():
        weight = model.get_parameter(name).data.view(-1)
        places = torch.randint(score.numel(), (4,), generator=generator)
        differences = []
        for place in places.tolist():
            value = float(weight[place])
            sides = []
            for step in (1e-3, -1e-3):
                weight[place] = value + step
                sides.append(loss())
            weight[place] = value
            differences.append(abs(sides[0] - sides[1]) / 2e-3)
        found, expected = score.view(-1)[places], torch.tensor(differences)
        # The log-probabilities are float32, whatever the model is.
        assert float((found - expected).norm()) <= 0.01 * float(expected.norm()) + 2e-4, name
        assert float(expected.norm()) > 2e-3, name


@pytest.mark.parametrize(
    "objective", [RefusalMargin(limit=20), RefusalLikelihood(limit=20)], ids=["margin", "likelihood"]
)
@pytest.mark.parametrize("fused", [False, True], ids=["dense", "experts"])
def test_batch_size_changes_nothing(
    fused: bool, objective: SafetyObjective, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = tiny_mixtral() if fused else make_tiny_model()
    results = [expected_safety_impact(model, objective, tiny_tokenizer, batch_size=size) for size in (1, 3, 8, 20)]
    for other in results[1:]:
        for name, score in results[0].items():
            assert float((other[name] - score).norm() / score.norm()) <= 1e-5, name
        assert select_top(other, 0.01) == select_top(results[0], 0.01)


def tiny_mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MixtralConfig(
        vocab_size=512, num_key_value_heads=2, num_local_experts=3, max_position_embeddings=512, **sizes
    )
    return MixtralForCausalLM(config).eval()


def test_fused_experts_are_scaled_by_their_own_spread(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_mixtral()
    name = "model.layers.0.mlp.experts.down_proj"
    weight = model.get_parameter(name)
    weight.data[1] *= 5
    objective = RefusalMargin(limit=4)
    plain = expected_safety_impact(model, objective, tiny_tokenizer, scale="none", include=name)
    scaled = expected_safety_impact(model, objective, tiny_tokenizer, include=name)
    for expert in range(3):
        spread = weight[expert].detach().double().std(correction=0).float()
        torch.testing.assert_close(scaled[name][expert], plain[name][expert] * spread)


def test_scores_are_of_the_model_as_it_is_used(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """Dropout is off and autocast does not reach in, whatever the model and its surroundings are set to."""
    model = make_tiny_model(attention_dropout=0.5)
    expected = expected_safety_impact(model, RefusalMargin(limit=4), tiny_tokenizer)
    model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        found = expected_safety_impact(model, RefusalMargin(limit=4), tiny_tokenizer)
    with torch.inference_mode():
        found_again = expected_safety_impact(model, RefusalMargin(limit=4), tiny_tokenizer)
    for name, score in expected.items():
        assert torch.equal(found[name], score)
        assert torch.equal(found_again[name], score)


def test_low_precision_adds_up_in_float32(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_tiny_model().bfloat16()
    scores = expected_safety_impact(model, RefusalMargin(limit=6), tiny_tokenizer, batch_size=1)
    precise = expected_safety_impact(copy.deepcopy(model).float(), RefusalMargin(limit=6), tiny_tokenizer)
    for name, score in scores.items():
        assert score.dtype == torch.float32
        assert float((score - precise[name]).norm() / precise[name].norm()) < 0.1


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_of_transformers(use_reentrant: bool, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_tiny_model()
    expected = expected_safety_impact(model, RefusalMargin(limit=3), tiny_tokenizer)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    found = expected_safety_impact(model.train(), RefusalMargin(limit=3), tiny_tokenizer)
    for name, score in expected.items():
        torch.testing.assert_close(found[name], score)


def test_the_built_in_examples_suffice(tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    objective = RefusalMargin(load_prompts("harmful", split="score")[:10])
    scores = expected_safety_impact(tiny_model, objective, tiny_tokenizer, show_progress=False)
    mask = select_top(scores, 0.01, metadata=objective.describe())
    mask.check_model(tiny_model)
    assert mask.metadata["objective"] == "RefusalMargin"
