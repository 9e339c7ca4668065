# SPDX-License-Identifier: Apache-2.0
"""What `SparseDelta` refuses, leaving everything as it was."""

from __future__ import annotations

from typing import Any

import bitsandbytes
import peft
import pytest
import torch
from torch import nn

from lightning_safety.enforcement import SparseDelta
from lightning_safety.language import find_language_model, named_weights
from lightning_safety.scoring import SafetyMask
from tests.enforcement.adapters import loss_of, make_adapted_model
from tests.enforcement.deltas import count_traces, make_base, make_mask, train
from tests.enforcement.test_compact_refused import RowState
from tests.scoring.mixtures import make_mixture
from tests.tiny import make_tiny_model


def refuse(model: nn.Module, mask: SafetyMask, message: str, optimizers: list[Any] | None = None) -> None:
    optimizers = [torch.optim.SGD(model.parameters())] if optimizers is None else optimizers
    groups = [[list(map(id, group["params"])) for group in optimizer.param_groups] for optimizer in optimizers]
    flags = [weight.requires_grad for weight in model.parameters()]
    traces = count_traces(model, *optimizers)
    with pytest.raises(ValueError, match=message):
        SparseDelta(mask).attach(model, optimizers)
    assert count_traces(model, *optimizers) == traces
    assert [weight.requires_grad for weight in model.parameters()] == flags
    for optimizer, held in zip(optimizers, groups, strict=True):
        assert [list(map(id, group["params"])) for group in optimizer.param_groups] == held


def everything(model: nn.Module, *names: str) -> SafetyMask:
    weights = {name: weight for name, weight in named_weights(model).items() if name in names}
    return SafetyMask(
        {name: torch.arange(weight.numel()) for name, weight in weights.items()},
        {name: tuple(weight.shape) for name, weight in weights.items()},
    )


def test_fused_experts() -> None:
    model = make_mixture("mixtral").requires_grad_(False)
    message = r"weights of linear layers where the base is frozen.*`model\.layers\.0\.mlp\.experts\..*Unfreeze the base"
    refuse(model, make_mask(model), message)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight"])
def test_weights_of_other_layers(name: str) -> None:
    model = make_tiny_model(tie_word_embeddings=False).requires_grad_(False)
    refuse(model, everything(model, name), rf"`{name}` is that of none")


def test_a_head_that_is_tied_to_the_embedding() -> None:
    model = make_tiny_model().requires_grad_(False)
    refuse(model, everything(model, "model.embed_tokens.weight"), r"is that of none, or of several \(1 such tensors\)")


def test_a_weight_that_two_layers_share() -> None:
    model = make_base("frozen")
    layers = model.model.layers
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    refuse(model, everything(model, "model.layers.0.mlp.up_proj.weight"), "or of several")


def test_mask_of_another_model() -> None:
    refuse(make_base("frozen"), make_mask(make_tiny_model(hidden_size=64)), "expected to fit the model")


def test_several_optimizers_or_none() -> None:
    model = make_base("LoRA")
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    two = [torch.optim.SGD(weights[:3]), torch.optim.SGD(weights[3:])]
    refuse(model, make_mask(model), "expected to return one optimizer where the base is frozen.*returns 2", two)
    refuse(model, make_mask(model), "but returns 0", [])


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("AdamW8bit", bitsandbytes.optim.AdamW8bit),
        ("Muon", lambda weights: torch.optim.Muon([weight for weight in weights if weight.dim() == 2])),
        ("Adafactor", torch.optim.Adafactor),
    ],
)
def test_optimizers_that_look_at_more_than_one_weight(name: str, make: Any) -> None:
    model = make_base("LoRA")
    optimizer = make([weight for weight in model.parameters() if weight.requires_grad])
    refuse(model, make_mask(model), f"treat every weight by its own gradient but {name}", [optimizer])


def test_an_unknown_optimizer_is_found_out_at_its_first_step() -> None:
    model = make_base("frozen")
    mask = make_mask(model)
    optimizer = RowState(model.parameters(), lr=0.1)
    before = {name: weight.detach().clone() for name, weight in named_weights(model).items()}
    with SparseDelta(mask).attach(model, [optimizer]):
        loss_of(model).backward()
        with pytest.raises(RuntimeError, match="one value per weight but RowState keeps"):
            optimizer.step()
    assert all(torch.equal(weight, before[name]) for name, weight in named_weights(model).items())


def test_an_optimizer_that_evaluates_twice_in_a_step_is_found_out() -> None:
    model = make_base("frozen")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    SparseDelta(make_mask(model)).attach(model, [optimizer])
    with torch.no_grad():
        optimizer.param_groups[0]["params"][0].add_(1.0)
    with pytest.raises(RuntimeError, match="expected to evaluate the model once in a step"):
        loss_of(model)


def test_not_an_optimizer() -> None:
    with pytest.raises(TypeError, match=r"expected to be a `torch\.optim\.Optimizer` that reports its steps"):
        SparseDelta(make_mask(make_base("frozen"))).attach(make_base("frozen"), [object()])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, r"plain LoRA ones, but has others \(lora\.layer\.Linear\), or a variant such as DoRA"),
        (peft.BOFTConfig(target_modules=["v_proj"], boft_block_size=4), r"but has others \(boft\.layer\.Linear\)"),
    ],
    ids=["DoRA", "BOFT"],
)
def test_adapters_that_use_the_weight_in_ways_of_their_own(settings: Any, message: str) -> None:
    adapted = make_adapted_model(**settings) if isinstance(settings, dict) else None
    model = find_language_model(peft.get_peft_model(make_tiny_model(), settings) if adapted is None else adapted)
    refuse(model, make_mask(model, include=["*v_proj*"]), message)


def test_merged_adapters() -> None:
    adapted = make_adapted_model(trained=True)
    adapted.merge_adapter()
    model = find_language_model(adapted)
    refuse(model, make_mask(model), r"merged ones \(\['default'\]\): its weight is another already")


def test_another_mask_than_that_of_the_difference_which_acts() -> None:
    model = make_base("nf4")
    first, second = make_mask(model), make_mask(model, seed=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    delta = SparseDelta(first).attach(model, [optimizer])
    train(model, optimizer, 1)
    delta.settle()
    message = "expected to be that of the difference which acts on .* it selects other weights"
    refuse(model, second, message)
    # Fewer layers are another mask too: the others would act unseen.
    name = next(name for name, index in first.indices.items() if index.numel())
    refuse(model, SafetyMask({name: first.indices[name]}, {name: first.shapes[name]}), message)
