# SPDX-License-Identifier: Apache-2.0
"""Router load: every real token once, in every family, whatever the batches."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from lightning_safety.scoring import MixtureLayout, ObjectiveBatch, RefusalMargin, SafetyObjective, measure_router_load
from lightning_safety.scoring.families import FAMILIES
from tests.scoring.linear import MeanOutput
from tests.scoring.mixtures import CHOSEN, EXPERTS, make_mixture, send_padding_to, starve, with_single_experts
from tests.tiny import make_tiny_model


def rows_of(objective: SafetyObjective, tokenizer: Any) -> list[Tensor]:
    """Every sequence of an objective, without padding."""
    batches = objective.batches(tokenizer, batch_size=1)
    pairs = (
        (row, mask)
        for batch in batches
        for row, mask in zip(batch.tensors["input_ids"], batch.tensors["attention_mask"], strict=True)
    )
    return [row[mask.bool()] for row, mask in pairs]


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe"])
def test_load_equals_counting_what_routers_return(
    family: str, batch_size: int, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model, objective = make_mixture(family), RefusalMargin(limit=4)
    counts = {name: torch.zeros(EXPERTS) for name, _ in model.named_modules() if name.endswith(".mlp.experts")}
    rows = rows_of(objective, tiny_tokenizer)
    with torch.no_grad():
        for row in rows:
            logits = model(row[None], output_router_logits=True).router_logits
            for count, layer in zip(counts.values(), logits, strict=True):
                count += layer.topk(CHOSEN).indices.flatten().bincount(minlength=EXPERTS)
    load = measure_router_load(model, objective, tiny_tokenizer, batch_size=batch_size)
    assert load.tokens == sum(map(len, rows))
    assert list(load.shares) == list(counts)
    for name, count in counts.items():
        assert list(load.shares[name]) == ["0", "1", "2", "3", "4"]
        torch.testing.assert_close(torch.tensor(list(load.shares[name].values())), count / load.tokens)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_shows_its_load(family: str, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_mixture(family)
    load = measure_router_load(model, RefusalMargin(limit=3), tiny_tokenizer)
    assert load.shares
    for shares in load.shares.values():
        assert sum(shares.values()) == pytest.approx(CHOSEN)
        assert max(shares.values()) <= 1
        assert len(set(shares.values())) > 1


def test_padding_is_not_counted(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_mixture("mixtral", num_hidden_layers=1)
    send_padding_to(model, 2, tiny_tokenizer.pad_token_id)
    (shares,) = measure_router_load(model, RefusalMargin(limit=6), tiny_tokenizer).shares.values()
    assert [expert for expert, share in shares.items() if not share] == ["2"]


def test_an_expert_that_no_token_reaches_has_no_load(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_mixture("olmoe")
    starve(model, 4)
    for shares in measure_router_load(model, RefusalMargin(limit=4), tiny_tokenizer).shares.values():
        assert [expert for expert, share in shares.items() if not share] == ["4"]


def test_the_model_is_left_as_it_was(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_mixture("mixtral").train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    measure_router_load(model, RefusalMargin(limit=2), tiny_tokenizer)
    assert torch.equal(torch.rand(2), expected)
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.config.use_cache


def test_routers_that_return_numbers_are_read_where_experts_are_modules(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    """The router of much remote code: it returns weights and numbers; the list of experts is never called itself."""

    class Router(nn.Module):
        def __init__(self, gate: nn.Linear) -> None:
            super().__init__()
            self.gate = gate

        def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
            weights, numbers = self.gate(tokens).softmax(dim=-1).topk(CHOSEN)
            return weights / weights.sum(dim=-1, keepdim=True), numbers

    objective = RefusalMargin(limit=4)
    expected = measure_router_load(make_mixture("mixtral"), objective, tiny_tokenizer)
    single = with_single_experts(make_mixture("mixtral"))
    with pytest.raises(ValueError, match=r"`model.layers.0.mlp.experts` are chosen but neither.*cannot be measured"):
        measure_router_load(single, objective, tiny_tokenizer)
    for layer in single.model.layers:
        layer.mlp.gate = Router(layer.mlp.gate)
        layer.mlp.forward = lambda hidden, block=layer.mlp: route(block, hidden)
    assert measure_router_load(single, objective, tiny_tokenizer) == expected


def route(block: Any, hidden: Tensor) -> Tensor:
    tokens = hidden.reshape(-1, hidden.shape[-1])
    weights, numbers = block.gate(tokens)
    output = torch.zeros_like(tokens)
    for number, expert in enumerate(block.experts):
        token, place = torch.where(numbers == number)
        output = output.index_add(0, token, expert(tokens[token]) * weights[token, place, None])
    return output.view_as(hidden)


def test_models_and_objectives_without_load_are_refused(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match=r"expected to have experts but LlamaForCausalLM has none"):
        measure_router_load(make_tiny_model(), RefusalMargin(limit=2), tiny_tokenizer)
    inputs = MeanOutput(torch.ones(2, 3), torch.ones(2))
    with pytest.raises(ValueError, match=r"`input_ids` and `attention_mask` but they hold inputs"):
        measure_router_load(make_mixture("mixtral"), inputs, tiny_tokenizer)


def test_patterns_are_used(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_mixture("mixtral")
    expected = measure_router_load(model, RefusalMargin(limit=2), tiny_tokenizer)
    model.config.model_type = "own_moe"
    layout = MixtureLayout("*.mlp.experts", "*.mlp.gate")
    assert measure_router_load(model, RefusalMargin(limit=2), tiny_tokenizer, mixture=layout) == expected


class OnTheLeft(RefusalMargin):
    """The same examples with their padding on the left."""

    def batches(self, tokenizer: Any, *, batch_size: int) -> list[ObjectiveBatch]:
        found = []
        for batch in super().batches(tokenizer, batch_size=batch_size):
            order = batch.tensors["attention_mask"].argsort(dim=1, stable=True)
            found.append(
                ObjectiveBatch(
                    {name: tensor.gather(1, order) for name, tensor in batch.tensors.items()}, batch.examples
                )
            )
        return found


def test_padding_may_be_on_the_left(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_mixture("qwen3_moe")
    right = measure_router_load(model, RefusalMargin(limit=6), tiny_tokenizer)
    left = measure_router_load(model, OnTheLeft(limit=6), tiny_tokenizer)
    assert left.tokens == right.tokens
    for name, shares in right.shares.items():
        # Rounding may tip a choice.
        assert left.shares[name] == pytest.approx(shares, abs=3 / right.tokens)
