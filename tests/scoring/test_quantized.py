# SPDX-License-Identifier: Apache-2.0
"""The impact of quantised weights is that of the weights they stand for, by the same names and in the same shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from lightning_safety.language import keep_unpacked, quantized_layers
from lightning_safety.scoring import (
    RefusalMargin,
    SafetyMask,
    expected_safety_impact,
    mean_gradients,
    scored_weights,
    select_random,
    select_top,
)
from tests.quantized import FOUR_BIT, WIDE, dense_twin, make_quantized_model, relative_error, repacks
from tests.scoring.linear import NO_TOKENIZER, MeanOutput
from tests.tiny import make_tiny_model

OBJECTIVE = RefusalMargin(limit=4)


def with_adapters(model: Any) -> Any:
    return get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert list(found) == list(expected)
    for name, score in expected.items():
        assert found[name].shape == score.shape
        assert found[name].dtype == torch.float32
        assert relative_error(found[name], score) <= tolerance, name


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", FOUR_BIT)
def test_four_bit_scores_are_those_of_the_dequantised_model(
    kind: str, tied: bool, adapted: bool, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """With an untied head, dense and quantised weights are scored in the same pass."""
    model = make_quantized_model(kind, make_tiny_model(**WIDE, tie_word_embeddings=tied))
    expected = expected_safety_impact(dense_twin(model), OBJECTIVE, tiny_tokenizer)
    assert len(expected) == 14 if tied else 15
    found = expected_safety_impact(with_adapters(model) if adapted else model, OBJECTIVE, tiny_tokenizer)
    assert_close(found, expected, 1e-5)


@pytest.mark.parametrize("scale", ["magnitude", "none"])
@pytest.mark.parametrize("reduction", ["signed", "absolute"])
def test_every_reduction_and_scale(reduction: Any, scale: Any, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_quantized_model()
    expected = expected_safety_impact(
        dense_twin(model), OBJECTIVE, tiny_tokenizer, reduction=reduction, scale=scale, include="*.0.*"
    )
    found = expected_safety_impact(model, OBJECTIVE, tiny_tokenizer, reduction=reduction, scale=scale, include="*.0.*")
    assert len(expected) == 7
    assert_close(found, expected, 1e-5)


def test_half_precision_adds_up_in_float32(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_quantized_model("nf4", make_tiny_model(**WIDE).bfloat16(), bnb_4bit_compute_dtype=torch.bfloat16)
    precise = expected_safety_impact(dense_twin(model).float(), OBJECTIVE, tiny_tokenizer)
    found = expected_safety_impact(model, OBJECTIVE, tiny_tokenizer, batch_size=1)
    assert_close(found, precise, 0.1)


@pytest.mark.parametrize("threshold", [0.0, 0.5, 6.0])
def test_eight_bit_scores_are_those_of_the_dequantised_model(
    threshold: float, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """The layers would quantise their inputs too, all but outliers, which depend on what else is in the batch."""
    model = make_quantized_model("int8", llm_int8_threshold=threshold)
    expected = expected_safety_impact(dense_twin(model), OBJECTIVE, tiny_tokenizer)
    found = expected_safety_impact(model, OBJECTIVE, tiny_tokenizer)
    assert_close(found, expected, 1e-5)
    twin, inputs = dense_twin(model), {"input_ids": torch.arange(3, 19).view(2, 8)}
    with torch.no_grad():
        assert relative_error(model(**inputs).logits, twin(**inputs).logits) > 1e-4


@pytest.mark.parametrize(("kind", "settings"), [("nf4-double", {}), ("int8", {"llm_int8_threshold": 2.0})])
def test_batch_size_changes_nothing(
    kind: str, settings: dict[str, Any], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = make_quantized_model(kind, **settings)
    results = [expected_safety_impact(model, RefusalMargin(limit=9), tiny_tokenizer, batch_size=n) for n in (1, 4, 9)]
    for other in results[1:]:
        assert_close(other, results[0], 1e-5)
        assert select_top(other, 0.01) == select_top(results[0], 0.01)


def test_gradients_have_the_sign_of_the_dense_ones(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_quantized_model()
    expected = mean_gradients(dense_twin(model), OBJECTIVE, tiny_tokenizer)
    assert_close(mean_gradients(model, OBJECTIVE, tiny_tokenizer), expected, 1e-5)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_scoring_leaves_a_quantised_model_as_it_was(kind: str, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = with_adapters(make_quantized_model(kind)).train()
    model.base_model.model.model.layers[0].eval()
    for weight in model.parameters():
        if weight.requires_grad:
            weight.grad = torch.ones_like(weight)
    values = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [weight.requires_grad for weight in model.parameters()]
    grads = [weight.grad for weight in model.parameters()]
    modes = [module.training for module in model.modules()]
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    expected_safety_impact(model, OBJECTIVE, tiny_tokenizer)
    assert torch.equal(torch.rand(1), expected)
    assert [weight.requires_grad for weight in model.parameters()] == flags
    assert all(weight.grad is grad for weight, grad in zip(model.parameters(), grads, strict=True))
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())


def test_a_quantised_layer_that_is_not_reached_scores_zero() -> None:
    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branches = nn.ModuleList([Linear4bit(64, 64, quant_type="nf4") for _ in range(2)]).to("cpu")

        def forward(self, inputs: Tensor) -> Tensor:
            output: Tensor = self.branches[0](inputs)
            return output

    model = Sparse()
    objective = MeanOutput(torch.randn(3, 64), torch.randn(64))
    scores = expected_safety_impact(model, objective, NO_TOKENIZER, scale="none")
    expected = torch.outer(objective.weights, objective.inputs.mean(dim=0)).abs()
    torch.testing.assert_close(scores["branches.0.weight"], expected)
    assert not scores["branches.1.weight"].any()


def test_a_compiled_quantised_model_is_scored() -> None:
    """Code that is compiled already would not call the hooks."""
    model = nn.Sequential(Linear4bit(64, 8, quant_type="nf4")).to("cpu")
    keep_unpacked(model)
    objective = MeanOutput(torch.randn(3, 64), torch.randn(8))
    expected = expected_safety_impact(model, objective, NO_TOKENIZER)
    compiled: Any = torch.compile(model, backend="eager")
    compiled(objective.inputs)
    assert torch.equal(expected_safety_impact(compiled, objective, NO_TOKENIZER)["0.weight"], expected["0.weight"])


def test_masks_fit_the_dense_and_the_quantised_model(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_quantized_model()
    mask = select_top(expected_safety_impact(model, OBJECTIVE, tiny_tokenizer), 0.01)
    mask.check_model(model)
    mask.check_model(dense_twin(model))
    mask.check_model(with_adapters(model))
    random = select_random({name: torch.empty(shape, device="meta") for name, shape in mask.shapes.items()}, 0.01, 0)
    random.check_model(model)
    name = "model.layers.0.mlp.up_proj.weight"
    packed = tuple(scored_weights(model)[name].shape)
    with pytest.raises(ValueError, match=rf"`{name}`: 4096×1 in the mask, 128×64 in the model"):
        SafetyMask({name: torch.tensor([0])}, {name: packed}).check_model(model)


def test_adapters_are_never_scored() -> None:
    model = make_quantized_model("nf4-in-bfloat16")
    names = list(scored_weights(model))
    assert names == list(scored_weights(with_adapters(model)))
    assert len(names) == 14


class RootOfZero(MeanOutput):
    """Finite, with an infinite gradient."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        output = super().loss(model, batch)
        return (output - output.detach()).abs().sqrt()


def test_a_gradient_that_is_not_finite_names_the_quantised_weight() -> None:
    model = nn.Sequential(Linear4bit(64, 8, quant_type="nf4")).to("cpu")
    with pytest.raises(RuntimeError, match=r"gradient of `0.weight` is not finite in batch 1 of 1"):
        expected_safety_impact(model, RootOfZero(torch.ones(2, 64), torch.ones(8)), NO_TOKENIZER)


@repacks
def test_a_repacked_model_is_refused(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_quantized_model()
    with torch.no_grad():
        model(input_ids=torch.arange(3, 9)[None])
    with pytest.raises(ValueError, match=r"was repacked for this CPU .* Load the model again"):
        expected_safety_impact(model, OBJECTIVE, tiny_tokenizer)


def test_scoring_keeps_weights_unpacked(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_quantized_model()
    expected_safety_impact(model, OBJECTIVE, tiny_tokenizer)
    assert {layer.support_avx512bf16_for_cpu for _, layer in quantized_layers(model)} == {False}


def test_an_unsupported_quantisation_is_refused(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model: Any = make_tiny_model()
    model.is_quantized, model.quantization_method = True, "gptq"
    with pytest.raises(ValueError, match=r"is quantised by gptq. Load the unquantised model"):
        expected_safety_impact(model, OBJECTIVE, tiny_tokenizer)


class Packed(Tensor):
    """As torchao's: a tensor whose dtype is that of the weight it stands for."""


def test_a_tensor_class_of_its_own_is_refused() -> None:
    model: Any = make_tiny_model()
    weight = model.model.layers[1].mlp.up_proj.weight
    model.model.layers[1].mlp.up_proj.weight = nn.Parameter(weight.detach().as_subclass(Packed))
    with pytest.raises(ValueError, match=r"`model.layers.1.mlp.up_proj.weight` is a Packed. Quantised weights can be"):
        scored_weights(model)
