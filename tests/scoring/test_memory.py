# SPDX-License-Identifier: Apache-2.0
"""The estimate counts what scoring makes, and says what to do where it does not fit."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from lightning_safety.data import Example
from lightning_safety.scoring import (
    LeanScoring,
    ObjectiveBatch,
    RefusalLikelihood,
    RefusalMargin,
    SafetyObjective,
    ScoringMemory,
    estimate_scoring_memory,
    expected_safety_impact,
    memory,
)
from tests.quantized import make_quantized_model
from tests.scoring.linear import NO_TOKENIZER, Linear, MeanOutput
from tests.scoring.mixtures import make_mixture
from tests.tiny import make_tiny_model

GPU = torch.device("cuda:0")
SIMILAR = [Example(f"Tell me how to do this very bad thing to person {number}.", "I can't.") for number in range(2)]


@pytest.mark.parametrize("kind", ["dense", "nf4", "mixture"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sums_and_scores_are_exact(kind: str, dtype: Any, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    makers = {"dense": make_tiny_model, "nf4": make_quantized_model, "mixture": lambda: make_mixture("qwen3_moe")}
    model = makers[kind]()
    options: dict[str, Any] = {"exclude": "*q_proj*", "accumulate_dtype": dtype}
    scores = expected_safety_impact(model, RefusalMargin(limit=2), tiny_tokenizer, **options)
    found = estimate_scoring_memory(model, RefusalMargin(limit=2), tiny_tokenizer, **options)
    assert found.scores == found.sums == sum(score.nbytes for score in scores.values())
    parts = estimate_scoring_memory(model, RefusalMargin(limit=2), tiny_tokenizer, passes=3, **options)
    assert parts.scores == found.scores
    assert found.scores / 3 <= parts.sums < found.scores


def saved_bytes(model: nn.Module, objective: SafetyObjective, batch: ObjectiveBatch) -> int:
    """What autograd keeps, beside the weights."""
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        objective.loss(model, batch)
    return sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in weights)


def tiny_qwen() -> Qwen3ForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=512, num_key_value_heads=4, head_dim=8, **sizes)).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("objective", [RefusalMargin(limit=8), RefusalLikelihood(limit=8)], ids=["margin", "written"])
@pytest.mark.parametrize("make", [make_tiny_model, tiny_qwen])
def test_activations_are_about_what_autograd_keeps(
    make: Any, objective: Any, dtype: torch.dtype, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = make().to(dtype)
    for size in (2, 8):
        largest = objective.batches(tiny_tokenizer, batch_size=size)[0]
        found = estimate_scoring_memory(model, objective, tiny_tokenizer, batch_size=size)
        # The gradient of the logits comes later; in so small a model they are much of all.
        kept = saved_bytes(model, objective, largest)
        assert 0.8 <= found.activations / kept <= 2


def test_gradients_wait_where_rows_share_a_prefix(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_tiny_model()
    alone = estimate_scoring_memory(model, RefusalLikelihood(limit=2), tiny_tokenizer, batch_size=1)
    assert alone.gradients == 32 * 64 * 4
    shared = estimate_scoring_memory(model, RefusalLikelihood(SIMILAR), tiny_tokenizer, batch_size=2)
    assert shared.gradients == shared.sums
    parts = estimate_scoring_memory(model, RefusalLikelihood(SIMILAR), tiny_tokenizer, batch_size=2, passes=3)
    assert parts.gradients == parts.sums < shared.gradients
    merged = estimate_scoring_memory(model, RefusalMargin(SIMILAR), tiny_tokenizer, batch_size=1)
    assert merged.gradients == alone.gradients
    absolute = estimate_scoring_memory(model, RefusalLikelihood(limit=2), tiny_tokenizer, reduction="absolute")
    assert absolute.gradients == 2 * alone.gradients


def memory_of(device: torch.device = GPU, **choices: Any) -> ScoringMemory:
    sums = 100 // choices.get("passes", 1)
    return ScoringMemory(device, sums * 10**9, 100 * 10**9, 10**9, 20 * 10**9, LeanScoring(**choices))


@pytest.mark.parametrize(
    ("choices", "on_device", "in_main_memory"),
    [({}, 120, 0), ({"passes": 4}, 45, 100), ({"accumulate_on": "cpu"}, 20, 100)],
)
def test_where_the_memory_is(choices: dict[str, Any], on_device: int, in_main_memory: int) -> None:
    found = memory_of(**choices)
    assert found.on_device == on_device * 10**9
    assert found.in_main_memory == in_main_memory * 10**9
    assert memory_of(torch.device("cpu"), **choices).on_device == 120 * 10**9
    assert f"about {on_device}.00 GB on cuda:0" in found.summary()
    assert ("of main memory" in found.summary()) == bool(in_main_memory)


def with_free(monkeypatch: pytest.MonkeyPatch, on_gpu: int | None, in_main: int | None = 10**15) -> None:
    free = {"cuda": on_gpu, "cpu": in_main}
    monkeypatch.setattr(memory, "free_memory", lambda device: free[device.type])


def test_what_does_not_fit_is_refused_with_what_would(monkeypatch: pytest.MonkeyPatch) -> None:
    with_free(monkeypatch, 60 * 10**9)
    with pytest.raises(MemoryError, match=r"leave 101.00 GB free on cuda:0 .* but 60.00 GB is\. Pass `passes=3`") as e:
        memory_of().check_free()
    assert '`accumulate_on="cpu"` or `accumulate_dtype="bfloat16"`' in str(e.value)
    memory_of(passes=3).check_free()
    with_free(monkeypatch, 60 * 10**9, 99 * 10**9)
    with pytest.raises(MemoryError, match=r"100\.00 GB of main memory"):
        memory_of(passes=3).check_free()
    with_free(monkeypatch, None, 99 * 10**9)
    with pytest.raises(MemoryError, match='Pass `accumulate_dtype="bfloat16"` or `include`') as error:
        memory_of(torch.device("cpu")).check_free()
    assert "passes" not in str(error.value)


def test_what_may_not_fit_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    with_free(monkeypatch, 110 * 10**9)
    with pytest.warns(UserWarning, match=r"about 120.00 GB .* 110.00 GB is free\. Lower .* Pass `passes=2`"):
        memory_of().check_free()
    with_free(monkeypatch, None, None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        memory_of().check_free()


def test_an_estimate_needs_to_know_of_tokens(tiny_model: LlamaForCausalLM) -> None:
    with pytest.raises(ValueError, match="`objective` and `tokenizer` expected to be given, or `tokens`"):
        estimate_scoring_memory(tiny_model)
    with pytest.raises(ValueError, match="`tokens` expected to be at least 1"):
        estimate_scoring_memory(tiny_model, tokens=0)
    objective = MeanOutput(torch.ones(2, 3), torch.ones(2))
    with pytest.raises(ValueError, match=r"MeanOutput has inputs\. .* pass `tokens`"):
        estimate_scoring_memory(tiny_model, objective, object())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Linear lacks them"):
        estimate_scoring_memory(Linear(), NO_TOKENIZER, tokens=3)
