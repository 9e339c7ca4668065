# SPDX-License-Identifier: Apache-2.0
"""What is scored in mixtures of experts: by family, by patterns, and by expert."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import DbrxConfig, DogeConfig, DogeForCausalLM, MixtralConfig, PreTrainedTokenizerFast

from lightning_safety.language import named_weights
from lightning_safety.scoring import (
    MixtureLayout,
    RefusalMargin,
    describe_mask,
    expected_safety_impact,
    scored_weights,
    select_random,
    select_top,
    weight_spread,
)
from lightning_safety.scoring.components import COMPONENTS
from lightning_safety.scoring.families import FAMILIES, number_of_experts
from lightning_safety.scoring.mixture import find_mixture
from tests.scoring.mixtures import (
    CONFIGS,
    EXPERTS,
    make_mixture,
    routers_of,
    send_padding_to,
    starve,
    with_single_experts,
)

SHOWN = pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe"])
OWN = MixtureLayout(experts="*.mlp.specialists", routers="*.mlp.switch")


def own_model() -> Any:
    """Mixtral with modules for experts, under names that nobody knows."""
    model = with_single_experts(make_mixture("mixtral"), "specialists", "switch")
    model.config.model_type = "own_moe"
    return model


# Families -------------------------------------------------------------------------------------------------------------


def test_every_family_is_tested() -> None:
    assert set(CONFIGS) == set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_are_scored_and_routers_never(family: str) -> None:
    model = make_mixture(family)
    weights = scored_weights(model)
    fused = {name: weight for name, weight in weights.items() if weight.dim() == 3}
    assert fused
    assert all(len(weight) == EXPERTS for weight in fused.values())
    expected = {name for name, weight in model.named_parameters() if weight.dim() == 3 and "conv" not in name}
    assert set(fused) == expected
    routers = routers_of(model)
    assert len(routers) >= len(fused) / 2
    assert not set(routers) & set(weights)
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    tied = {name for name in linear if model.get_parameter(name) is model.get_input_embeddings().weight}
    left_out = (linear & set(named_weights(model))) - set(weights) - set(routers) - tied
    assert all("shared_expert_gate" in name for name in left_out), left_out


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_are_told_apart(family: str) -> None:
    weights = scored_weights(make_mixture(family))
    shapes = {name: torch.empty(weight.shape, device="meta") for name, weight in weights.items()}
    description = describe_mask(select_random(shapes, 0.1, 0))
    attention = {name.rpartition(".")[0].rpartition(".")[2] for name in weights if "self_attn" in name}
    known = {row.group for row in description.components} & set(COMPONENTS)
    assert {"expert", "o"} <= known
    assert known & {"k", "qkv", "kv"}, attention
    layers = {row.layer for row in description.experts}
    assert len(description.experts) == EXPERTS * len(layers)


@SHOWN
def test_wrapped_models_have_the_same_experts(family: str) -> None:
    model = make_mixture(family)
    names = list(scored_weights(model))
    lora = get_peft_model(make_mixture(family), LoraConfig(r=2, target_modules=["q_proj", "gate"]))
    assert list(scored_weights(lora)) == names
    fused = get_peft_model(make_mixture(family), LoraConfig(r=2, target_parameters=["experts.down_proj"]))
    assert list(scored_weights(fused)) == names
    assert list(scored_weights(torch.compile(model))) == names  # type: ignore[arg-type]


# Models that are not in the table -------------------------------------------------------------------------------------


def test_an_unknown_family_is_refused_with_what_was_seen() -> None:
    with pytest.raises(ValueError, match=r"model_type 'own_moe'\) seems to have experts") as raised:
        scored_weights(own_model())
    for part in ("MixtureLayout(experts=", "Known families: ", "mixtral", "`model.layers.*.mlp` (SingleExperts)"):
        assert part in str(raised.value)


def test_experts_without_a_configuration_are_refused() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2)])

    with pytest.raises(ValueError, match=r"Own \(model_type ''\) seems to have experts"):
        scored_weights(Own())


def test_a_known_name_on_other_code_is_refused() -> None:
    renamed = with_single_experts(make_mixture("mixtral"), "experts", "switch")
    with pytest.raises(ValueError, match="seems to have experts and is not"):
        scored_weights(renamed)


def test_a_count_inside_of_the_configuration_is_seen() -> None:
    assert number_of_experts(DbrxConfig(ffn_config={"moe_num_experts": 6})) == 6
    assert number_of_experts(MixtralConfig(num_local_experts=3)) == 3


def test_dense_models_of_unknown_families_say_so() -> None:
    config = DogeConfig(vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    model = DogeForCausalLM(config)
    with pytest.raises(ValueError, match=r"'doge'.*with no patterns if it has none.*none by such a name"):
        scored_weights(model)
    assert len(scored_weights(model, mixture=MixtureLayout([], []))) >= 7


def test_patterns_say_where_experts_are() -> None:
    fused = scored_weights(make_mixture("mixtral"))
    single = scored_weights(own_model(), mixture=OWN)
    assert not any("switch" in name for name in single)
    assert sum(weight.numel() for weight in single.values()) == sum(weight.numel() for weight in fused.values())
    mixture = find_mixture(own_model(), OWN)
    assert mixture.experts == {f"model.layers.{layer}.mlp.specialists": ("0", "1", "2", "3", "4") for layer in (0, 1)}
    assert not mixture.fused


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (MixtureLayout("*.specialist", "*.switch"), r"experts that are modules .*'\*.specialist' matches none"),
        (MixtureLayout("*.specialists", "*.router"), r"routers that are modules .*'\*.router' matches none"),
        (MixtureLayout("*.self_attn", "*.switch"), r"`model.layers.0.self_attn` .* as one submodule each, .*neither"),
    ],
)
def test_patterns_that_fit_nothing_are_refused(layout: MixtureLayout, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scored_weights(own_model(), mixture=layout)


def test_tensors_that_disagree_about_the_number_of_experts_are_refused() -> None:
    model = make_mixture("mixtral")
    experts = model.model.layers[1].mlp.experts
    experts.down_proj = nn.Parameter(experts.down_proj[:3].detach())
    with pytest.raises(ValueError, match=r"layers.1.mlp.experts.gate_up_proj`: 5, .*down_proj`: 3"):
        scored_weights(model)


def test_patterns_must_be_text() -> None:
    with pytest.raises(TypeError, match="`routers` expected to be a pattern or a list"):
        MixtureLayout("*.experts", [3])  # type: ignore[list-item]


# Scores ---------------------------------------------------------------------------------------------------------------


def reference(model: Any, objective: Any, tokenizer: Any) -> dict[str, Tensor]:
    """σ · |mean gradient| by plain backward passes over single examples, through the experts' own plain code."""
    model = copy.deepcopy(model)
    model.config._experts_implementation = "eager"
    batches = objective.batches(tokenizer, batch_size=1)
    for batch in batches:
        (objective.loss(model, batch) / len(batches)).backward()
    scores = {}
    for name, weight in model.named_parameters():
        gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
        parts = list(weight.detach().double()) if weight.dim() == 3 else [weight.detach().double()]
        spread = torch.stack([((part - part.mean()) ** 2).mean().sqrt() for part in parts]).float()
        scores[name] = gradient.abs() * (spread.view(-1, 1, 1) if weight.dim() == 3 else spread)
    return scores


@SHOWN
def test_scores_equal_plain_backward_passes(family: str, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model, objective = make_mixture(family), RefusalMargin(limit=6)
    expected = reference(model, objective, tiny_tokenizer)
    scores = expected_safety_impact(model, objective, tiny_tokenizer, batch_size=3)
    assert set(scores) == set(scored_weights(model))
    for name, score in scores.items():
        known = ~score.isnan()
        assert known.any(), name
        assert float((score - expected[name])[known].norm() / expected[name].norm()) <= 1e-5, name
        assert not expected[name][~known].any(), name
        if score.dim() == 3:
            spread = weight_spread(model.get_parameter(name))
            assert spread.shape == (EXPERTS, 1, 1)
            assert float(spread.max() / spread.min()) > 1.5


def test_fused_and_single_experts_score_alike(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    objective = RefusalMargin(limit=4)
    fused = make_mixture("mixtral")
    single = with_single_experts(make_mixture("mixtral"))
    plain = expected_safety_impact(fused, objective, tiny_tokenizer, scale="none")
    found = expected_safety_impact(single, objective, tiny_tokenizer, scale="none")
    scaled = expected_safety_impact(single, objective, tiny_tokenizer)
    for layer in (0, 1):
        experts = f"model.layers.{layer}.mlp.experts"
        for expert in range(EXPERTS):
            gate, up = plain[f"{experts}.gate_up_proj"][expert].chunk(2)
            for part, score in {"w1": gate, "w3": up, "w2": plain[f"{experts}.down_proj"][expert]}.items():
                name = f"{experts}.{expert}.{part}.weight"
                torch.testing.assert_close(found[name], score, rtol=1e-4, atol=1e-9, equal_nan=True)
                spread = single.get_parameter(name).detach().double().std(correction=0).float()
                torch.testing.assert_close(scaled[name], found[name] * spread, equal_nan=True)


# Experts that no token reaches ----------------------------------------------------------------------------------------


@SHOWN
@pytest.mark.parametrize("reduction", ["signed", "absolute"])
def test_an_expert_that_no_token_reaches_is_not_scored(
    reduction: Any, family: str, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = make_mixture(family)
    starve(model, 3)
    scores = expected_safety_impact(model, RefusalMargin(limit=6), tiny_tokenizer, reduction=reduction)
    for name, score in scores.items():
        if score.dim() == 3:
            assert score[3].isnan().all(), name
            assert not score[[0, 1, 2, 4]].isnan().any(), name
        else:
            assert not score.isnan().any(), name
    mask = select_top(scores, 1.0)
    unscored = sum(score[3].numel() for score in scores.values() if score.dim() == 3)
    assert mask.count == mask.scored == sum(score.numel() for score in scores.values()) - unscored


@pytest.mark.parametrize("batch_size", [1, 3, 6])
def test_padding_reaches_no_expert(batch_size: int, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_mixture("mixtral", num_hidden_layers=1)
    send_padding_to(model, 2, tiny_tokenizer.pad_token_id)
    scores = expected_safety_impact(model, RefusalMargin(limit=6), tiny_tokenizer, batch_size=batch_size)
    missing = [bool(expert.isnan().all()) for expert in scores["model.layers.0.mlp.experts.down_proj"]]
    assert missing == [False, False, True, False, False]


def test_single_experts_that_no_token_reaches_are_not_scored(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = own_model()
    starve(model, 1)
    scores = expected_safety_impact(model, RefusalMargin(limit=6), tiny_tokenizer, mixture=OWN)
    for name, score in scores.items():
        assert bool(score.isnan().all()) == (".specialists.1." in name), name
    with pytest.raises(ValueError, match="seems to have experts"):
        expected_safety_impact(model, RefusalMargin(limit=2), tiny_tokenizer)


@pytest.mark.parametrize(("zeros", "still"), [("down_proj", "gate_up_proj"), ("gate_up_proj", "down_proj")])
def test_an_expert_with_one_tensor_without_gradient_is_scored(
    zeros: str, still: str, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Its other tensor says that tokens reached it: one of zeros, whose own gradient is what the other lacks."""
    model = make_mixture("mixtral")
    weight = getattr(model.model.layers[0].mlp.experts, zeros)
    # Of gate and up, the gate alone: with both at zero, nothing would have a gradient.
    weight.data[2, : 24 if zeros == "gate_up_proj" else None] = 0
    scores = expected_safety_impact(model, RefusalMargin(limit=6), tiny_tokenizer, scale="none")
    assert not scores[f"model.layers.0.mlp.experts.{still}"][2].any()
    assert not scores[f"model.layers.0.mlp.experts.{still}"][2].isnan().any()
    assert scores[f"model.layers.0.mlp.experts.{zeros}"][2].any()
