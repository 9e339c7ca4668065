# SPDX-License-Identifier: Apache-2.0
"""The impact equals its formula, does not depend on the batch size, and leaves no trace."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

from lightning_safety.data import load_prompts
from lightning_safety.scoring import (
    ObjectiveBatch,
    RefusalLikelihood,
    RefusalMargin,
    SafetyObjective,
    expected_safety_impact,
    select_top,
)
from tests.tiny import make_tiny_model

NO_TOKENIZER: Any = None


class MeanOutput(SafetyObjective):
    """S(x) = cᵀ W x: its gradient with respect to W is the outer product of c and x."""

    def __init__(self, inputs: Tensor, weights: Tensor) -> None:
        self.inputs, self.weights = inputs, weights

    def batches(self, tokenizer: Any, *, batch_size: int) -> list[ObjectiveBatch]:
        parts = self.inputs.split(batch_size)
        return [ObjectiveBatch({"inputs": part}, len(part)) for part in parts]

    def loss(self, model: nn.Module, batch: ObjectiveBatch) -> Tensor:
        return -(model(batch.tensors["inputs"]) @ self.weights).mean()


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 2)
        self.norm = nn.LayerNorm(2)

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = self.head(inputs)
        return output


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


def test_frozen_weights_are_scored_and_stay_frozen(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_tiny_model()
    expected = expected_safety_impact(model, RefusalMargin(limit=4), tiny_tokenizer)
    model.requires_grad_(False)
    found = expected_safety_impact(model, RefusalMargin(limit=4), tiny_tokenizer)
    assert all(torch.equal(found[name], score) for name, score in expected.items())
    assert not any(weight.requires_grad for weight in model.parameters())


def disturb(model: LlamaForCausalLM) -> dict[str, Any]:
    """Give a model a state that careless scoring would change, and return that state."""
    model.train()
    model.model.layers[0].eval()
    model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    model.config.use_cache = True
    for number, weight in enumerate(model.parameters()):
        weight.grad = torch.full_like(weight, float(number)) if number % 2 and weight.requires_grad else None
    return {
        "values": [weight.detach().clone() for weight in model.parameters()],
        "gradients": [
            (id(weight.grad), None if weight.grad is None else weight.grad.clone()) for weight in model.parameters()
        ],
        "requires_grad": [weight.requires_grad for weight in model.parameters()],
        "modes": [module.training for module in model.modules()],
    }


def assert_undisturbed(model: LlamaForCausalLM, state: dict[str, Any]) -> None:
    for weight, value, (identity, gradient) in zip(
        model.parameters(), state["values"], state["gradients"], strict=True
    ):
        assert torch.equal(weight, value)
        assert id(weight.grad) == identity
        assert gradient is None or torch.equal(weight.grad, gradient)  # type: ignore[arg-type]
    assert [weight.requires_grad for weight in model.parameters()] == state["requires_grad"]
    assert [module.training for module in model.modules()] == state["modes"]
    assert model.config.use_cache is True
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class Failing(RefusalMargin):
    def loss(self, model: nn.Module, batch: ObjectiveBatch) -> Tensor:
        torch.rand(5), random.random(), np.random.rand()
        loss = super().loss(model, batch)
        if batch.examples < 4:
            raise KeyboardInterrupt
        return loss


@pytest.mark.parametrize("interrupted", [False, True])
def test_leaves_no_trace(
    interrupted: bool, tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    state = disturb(tiny_model)
    calls: list[str] = []
    for weight in tiny_model.parameters():
        if weight.requires_grad:
            weight.register_post_accumulate_grad_hook(lambda _: calls.append("accumulated"))
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    expected = torch.rand(1), random.random(), np.random.rand()
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    if interrupted:
        with pytest.raises(KeyboardInterrupt):
            expected_safety_impact(tiny_model, Failing(limit=6), tiny_tokenizer, batch_size=4)
    else:
        expected_safety_impact(tiny_model, Failing(limit=8), tiny_tokenizer, batch_size=4)
    assert (torch.rand(1), random.random(), np.random.rand()) == expected
    assert calls == []
    assert_undisturbed(tiny_model, state)


def test_the_loss_curve_is_the_same_with_and_without_scoring(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    def curve(*, scoring: bool) -> list[float]:
        torch.manual_seed(3)
        model = make_tiny_model(attention_dropout=0.2).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        objective = RefusalLikelihood(limit=8)
        losses = []
        for step, batch in enumerate(objective.batches(tiny_tokenizer, batch_size=2)):
            if scoring and step % 2 == 0:
                expected_safety_impact(model, RefusalMargin(limit=3), tiny_tokenizer)
            loss = objective.loss(model, batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        return losses

    assert curve(scoring=True) == curve(scoring=False)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_of_transformers(use_reentrant: bool, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_tiny_model()
    expected = expected_safety_impact(model, RefusalMargin(limit=3), tiny_tokenizer)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    found = expected_safety_impact(model.train(), RefusalMargin(limit=3), tiny_tokenizer)
    for name, score in expected.items():
        torch.testing.assert_close(found[name], score)


class Checkpointed(Linear):
    """A user's own checkpointing, which does not care about the mode."""

    def __init__(self, *, use_reentrant: bool) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant

    def forward(self, inputs: Tensor) -> Tensor:
        inputs = inputs.clone().requires_grad_()
        output: Tensor = checkpoint(self.head, inputs, use_reentrant=self.use_reentrant)
        return output


def test_gradient_checkpointing_of_the_user() -> None:
    objective = MeanOutput(torch.randn(4, 3), torch.randn(2))
    model = Checkpointed(use_reentrant=False)
    plain = Linear()
    plain.load_state_dict(model.state_dict())
    expected = expected_safety_impact(plain, objective, NO_TOKENIZER)["head.weight"]
    assert torch.equal(expected_safety_impact(model, objective, NO_TOKENIZER)["head.weight"], expected)
    with pytest.raises(RuntimeError, match="Reentrant gradient checkpointing hides the weights"):
        expected_safety_impact(Checkpointed(use_reentrant=True), objective, NO_TOKENIZER)


def with_nan_weight(model: Linear) -> None:
    model.head.weight.data[0, 0] = torch.nan


class RootOfZero(MeanOutput):
    """Finite, with an infinite gradient, in the second batch only."""

    def loss(self, model: nn.Module, batch: ObjectiveBatch) -> Tensor:
        output = super().loss(model, batch)
        return (output - output.detach()).abs().sqrt() if bool((batch.tensors["inputs"] > 2).any()) else output


class Detached(MeanOutput):
    def loss(self, model: nn.Module, batch: ObjectiveBatch) -> Tensor:
        return super().loss(model, batch).detach()


class Constant(MeanOutput):
    def loss(self, model: nn.Module, batch: ObjectiveBatch) -> Tensor:
        return super().loss(model, batch) * 0


def nothing(model: Linear) -> None:
    """Leave the model as it is."""


INPUTS = torch.tensor([[1.0, 1.0, 1.0], [3.0, 1.0, 1.0]])


@pytest.mark.parametrize(
    ("objective", "prepare", "message"),
    [
        (MeanOutput, with_nan_weight, "The loss of `objective` is nan in batch 1 of 2"),
        (RootOfZero, nothing, "The gradient of `head.weight` is not finite in batch 2 of 2, although the loss is 0"),
        (Detached, nothing, "does not depend on the weights"),
        (Constant, nothing, "zero for every weight"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    objective: type[MeanOutput], prepare: Callable[[Linear], None], message: str
) -> None:
    model = Linear()
    prepare(model)
    with pytest.raises(RuntimeError, match=message):
        expected_safety_impact(model, objective(INPUTS, torch.ones(2)), NO_TOKENIZER, batch_size=1)


class Paired(MeanOutput):
    def batches(self, tokenizer: Any, *, batch_size: int) -> list[ObjectiveBatch]:
        return super().batches(tokenizer, batch_size=2)


@pytest.mark.parametrize(
    ("objective", "arguments", "message"),
    [
        (
            MeanOutput,
            {"reduction": "sined"},
            "`reduction` expected to be one of 'signed', 'absolute' .*Did you mean `signed`",
        ),
        (MeanOutput, {"scale": "sd"}, "`scale` expected to be one of 'std', 'magnitude', 'none' but got 'sd'"),
        (MeanOutput, {"batch_size": 0}, "`batch_size` expected to be at least 1"),
        (MeanOutput, {"include": "*v_proj*"}, "`include` expected to match"),
        (Paired, {"reduction": "absolute"}, "one example a batch .* batch 1 of 1 holds 2"),
    ],
)
def test_bad_arguments_are_refused(objective: type[MeanOutput], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        expected_safety_impact(Linear(), objective(INPUTS, torch.ones(2)), NO_TOKENIZER, **arguments)


def test_an_objective_without_examples_is_refused() -> None:
    with pytest.raises(ValueError, match="expected to have examples but has no batch"):
        expected_safety_impact(Linear(), NoBatches(INPUTS, torch.ones(2)), NO_TOKENIZER)


class NoBatches(MeanOutput):
    def batches(self, tokenizer: Any, *, batch_size: int) -> list[ObjectiveBatch]:
        return []


def test_an_expert_no_token_reaches_scores_zero() -> None:
    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2)])

        def forward(self, inputs: Tensor) -> Tensor:
            output: Tensor = self.experts[0](inputs)
            return output

    scores = expected_safety_impact(Sparse(), MeanOutput(INPUTS, torch.ones(2)), NO_TOKENIZER)
    assert scores["experts.0.weight"].all()
    assert not scores["experts.1.weight"].any()


def test_the_built_in_examples_suffice(tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    objective = RefusalMargin(load_prompts("harmful", split="score")[:10])
    scores = expected_safety_impact(tiny_model, objective, tiny_tokenizer, show_progress=False)
    mask = select_top(scores, 0.01, metadata=objective.describe())
    mask.check_model(tiny_model)
    assert mask.metadata["objective"] == "RefusalMargin"
