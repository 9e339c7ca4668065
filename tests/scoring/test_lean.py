# SPDX-License-Identifier: Apache-2.0
"""Scoring in passes gives the same bits; half-precision sums and autocast give nearly the same mask."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedTokenizerFast

from lightning_safety.scoring import (
    LeanScoring,
    ObjectiveBatch,
    RefusalLikelihood,
    RefusalMargin,
    SafetyMask,
    expected_safety_impact,
    select_bottom,
    select_neurons,
    select_random,
    select_top,
)
from lightning_safety.scoring.lean import weight_blocks
from tests.quantized import make_quantized_model
from tests.scoring.linear import NO_TOKENIZER, Linear, MeanOutput
from tests.scoring.mixtures import make_mixture, starve, with_single_experts
from tests.tiny import make_tiny_model


def starved(model: Any) -> Any:
    starve(model, 3)
    return model


MODELS: dict[str, Callable[[], Any]] = {
    "dense": make_tiny_model,
    "frozen": lambda: make_tiny_model(tie_word_embeddings=False).requires_grad_(False),
    "bfloat16": lambda: make_tiny_model().bfloat16(),
    "nf4": make_quantized_model,
    "int8": lambda: make_quantized_model("int8"),
    "fused experts": lambda: starved(make_mixture("mixtral")),
    "single experts": lambda: with_single_experts(starved(make_mixture("mixtral"))),
}


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name, score in expected.items():
        assert found[name].dtype == score.dtype
        assert torch.equal(found[name].nan_to_num(-1), score.nan_to_num(-1)), name


@pytest.mark.parametrize("reduction", ["signed", "absolute"])
@pytest.mark.parametrize("model", MODELS)
def test_passes_change_no_bit(model: str, reduction: Any, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    scored = MODELS[model]()
    flags = [weight.requires_grad for weight in scored.parameters()]

    def score(**options: Any) -> dict[str, Tensor]:
        objective = RefusalMargin(limit=5)
        return expected_safety_impact(
            scored, objective, tiny_tokenizer, batch_size=2, reduction=reduction, show_progress=False, **options
        )

    expected = score()
    for passes in (2, 5, 1000):
        assert_same_bits(score(passes=passes), expected)
    assert_same_bits(score(accumulate_on="cpu"), expected)
    assert [weight.requires_grad for weight in scored.parameters()] == flags
    assert not any(module._forward_hooks for module in scored.modules())
    if "experts" in model:
        assert any(bool(score.isnan().any()) for score in expected.values())


def test_sums_exist_for_one_block_at_a_time(
    monkeypatch: pytest.MonkeyPatch, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """There is no other device here, so moving a score there and back counts as a copy."""
    alive: list[weakref.ref[Tensor]] = []
    most = 0
    zeros = LeanScoring.zeros

    def counting(self: LeanScoring, weight: nn.Parameter) -> Tensor:
        nonlocal most
        made = zeros(self, weight)
        alive.append(weakref.ref(made))
        found = [reference() for reference in alive]
        most = max(most, sum(total.numel() for total in found if total is not None))
        return made

    monkeypatch.setattr(LeanScoring, "zeros", counting)
    monkeypatch.setattr(Tensor, "cpu", Tensor.clone)
    scores = expected_safety_impact(make_tiny_model(), RefusalMargin(limit=2), tiny_tokenizer, passes=4)
    entries = sum(score.numel() for score in scores.values())
    assert len(alive) == len(scores) == 14
    assert most <= 1.4 * entries / 4


def test_every_pass_draws_the_same_random_numbers() -> None:
    model = Linear()
    model.tail = nn.Linear(2, 2, bias=False)
    model.forward = lambda inputs: model.tail(model.head(inputs))  # type: ignore[method-assign]
    inputs, weights = torch.randn(4, 3), torch.randn(2)
    found = []
    for passes in (1, 2):
        torch.manual_seed(3)
        found.append(expected_safety_impact(model, Noisy(inputs, weights), NO_TOKENIZER, passes=passes))
    assert len(found[0]) == 2
    assert_same_bits(found[1], found[0])


class Noisy(MeanOutput):
    def loss(self, model: nn.Module, batch: ObjectiveBatch) -> Tensor:
        return super().loss(model, batch) * torch.rand(())


class Constant(MeanOutput):
    def loss(self, model: nn.Module, batch: ObjectiveBatch) -> Tensor:
        return super().loss(model, batch).detach()


def test_a_block_without_gradient_is_fine_but_not_a_model() -> None:
    model = Linear()
    model.unused = nn.Linear(2, 2)
    objective = MeanOutput(torch.randn(4, 3), torch.randn(2))
    model.requires_grad_(False)
    scores = expected_safety_impact(model, objective, NO_TOKENIZER, passes=2)
    assert bool(scores["head.weight"].any())
    assert not bool(scores["unused.weight"].any())
    with pytest.raises(RuntimeError, match="zero for every weight"):
        expected_safety_impact(model, Constant(objective.inputs, objective.weights), NO_TOKENIZER, passes=2)


@pytest.mark.parametrize("options", [{"accumulate_dtype": "bfloat16"}, {"autocast": "bfloat16"}], ids=lambda o: min(o))
@pytest.mark.parametrize("objective", [RefusalMargin(limit=20), RefusalLikelihood(limit=20)], ids=["margin", "written"])
def test_half_precision_selects_nearly_the_same(
    objective: Any, options: dict[str, Any], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = make_tiny_model(initializer_range=0.1)
    expected = expected_safety_impact(model, objective, tiny_tokenizer)
    found = expected_safety_impact(model, objective, tiny_tokenizer, **options)
    for name, score in expected.items():
        assert found[name].dtype == (torch.bfloat16 if "accumulate_dtype" in options else torch.float32)
        assert float((found[name].float() - score).norm() / score.norm()) < 0.03, name
    assert jaccard(select_top(found, 0.1), select_top(expected, 0.1)) > 0.9
    assert jaccard(select_random(found, 0.1, seed=0), select_random(expected, 0.1, seed=0)) == 1


def jaccard(one: SafetyMask, other: SafetyMask) -> float:
    return (one & other).count / (one | other).count


@pytest.mark.parametrize("model", ["nf4", "int8", "fused experts"])
def test_autocast_reaches_every_kind_of_weight(model: str, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    scored = MODELS[model]()
    expected = expected_safety_impact(scored, RefusalMargin(limit=6), tiny_tokenizer)
    found = expected_safety_impact(scored, RefusalMargin(limit=6), tiny_tokenizer, autocast="bfloat16")
    for name, score in expected.items():
        assert torch.equal(found[name].isnan(), score.isnan())
        difference = (found[name] - score).nan_to_num()
        assert float(difference.norm()) < 0.1 * float(score.nan_to_num().norm()), name
    assert any(not torch.equal(found[name], score) for name, score in expected.items())


def test_autocast_is_that_of_the_argument(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_tiny_model()
    objective = RefusalMargin(limit=4)
    expected = expected_safety_impact(model, objective, tiny_tokenizer, autocast="bfloat16", passes=3)
    with torch.autocast("cpu", dtype=torch.float16, enabled=False):
        found = expected_safety_impact(model, objective, tiny_tokenizer, autocast="bfloat16")
    assert_same_bits(found, expected)


@pytest.mark.parametrize("select", [select_top, select_bottom, select_neurons])
def test_half_precision_scores_can_be_selected_from(select: Any, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_tiny_model()
    scores = expected_safety_impact(
        model, RefusalMargin(limit=4), tiny_tokenizer, passes=2, accumulate_on="cpu", accumulate_dtype="bfloat16"
    )
    mask = select(scores, 0.05)
    mask.check_model(model)
    assert mask == select({name: score.float() for name, score in scores.items()}, 0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"passes": 0}, "`passes` expected to be at least 1 but got 0"),
        ({"accumulate_on": "gpu"}, "`accumulate_on` expected to be one of 'device', 'cpu' but got 'gpu'"),
        ({"accumulate_dtype": "float16"}, "`accumulate_dtype` expected to be one of 'float32', 'bfloat16' but got"),
        ({"autocast": "float16"}, "`autocast` expected to be one of 'bfloat16' but got 'float16'"),
        ({"autocast": torch.float16}, "`autocast` expected to be one of 'bfloat16' but got torch.float16"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LeanScoring(**options)
    with pytest.raises(ValueError, match=message):
        expected_safety_impact(Linear(), MeanOutput(torch.ones(2, 3), torch.ones(2)), NO_TOKENIZER, **options)


@pytest.mark.parametrize(
    ("sizes", "passes", "expected"),
    [
        ([4, 1, 1, 1, 1], 2, [[4], [1, 1, 1, 1]]),
        ([1, 1, 6, 1], 3, [[1, 1], [6], [1]]),
        ([2, 2, 2], 1, [[2, 2, 2]]),
        ([2, 3], 9, [[2], [3]]),
    ],
)
def test_blocks_are_as_even_as_tensors_allow(sizes: list[int], passes: int, expected: list[list[int]]) -> None:
    weights = {str(number): nn.Parameter(torch.ones(size)) for number, size in enumerate(sizes)}
    blocks = weight_blocks(weights, passes)
    assert [[weight.numel() for weight in block.values()] for block in blocks] == expected
    assert [name for block in blocks for name in block] == list(weights)


class Watched(RefusalMargin):
    """Counts graphs of earlier batches that are still there when the next one begins."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.losses: list[weakref.ref[Tensor]] = []

    def loss(self, model: nn.Module, batch: ObjectiveBatch) -> Tensor:
        assert all(reference() is None for reference in self.losses)
        loss = super().loss(model, batch)
        self.losses.append(weakref.ref(loss))
        return loss


def test_no_graph_stands_beside_the_next_batch(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """A pass that goes backward only to its block leaves the rest of a graph as it was."""
    objective = Watched(limit=3)
    expected_safety_impact(make_tiny_model(), objective, tiny_tokenizer, batch_size=1, passes=2)
    assert len(objective.losses) == 6


class TwoCheckpointed(Linear):
    """A user's own checkpointing, which does not care about the mode: that of transformers rests while scoring."""

    def __init__(self, *, checkpointed: bool) -> None:
        super().__init__()
        self.tail = nn.Linear(2, 2)
        self.checkpointed = checkpointed

    def forward(self, inputs: Tensor) -> Tensor:
        inputs = inputs.clone().requires_grad_()
        for layer in (self.head, self.tail):
            inputs = checkpoint(layer, inputs, use_reentrant=False) if self.checkpointed else layer(inputs)
            inputs = inputs.tanh()
        return inputs


@pytest.mark.parametrize("passes", [1, 2])
def test_activation_checkpointing_changes_no_bit(passes: int) -> None:
    plain, model = TwoCheckpointed(checkpointed=False), TwoCheckpointed(checkpointed=True)
    model.load_state_dict(plain.state_dict())
    objective = MeanOutput(torch.randn(4, 3), torch.randn(2))
    expected = expected_safety_impact(plain, objective, NO_TOKENIZER)
    assert_same_bits(expected_safety_impact(model, objective, NO_TOKENIZER, passes=passes), expected)
