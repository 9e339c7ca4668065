# SPDX-License-Identifier: Apache-2.0
"""Packed weights are never read or written entry by entry: what holds weights skips them, what trains them refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lightning_safety.enforcement import CompactTraining, SafetyPatch, WeightHolder, snapshot_entries
from lightning_safety.enforcement.entries import selected_parameters
from lightning_safety.language import is_quantized_weight, named_weights, weight_shape
from lightning_safety.scoring import SafetyMask
from tests.quantized import FOUR_BIT, make_quantized_model, same_bits

UP, NORM = "model.layers.0.mlp.up_proj.weight", "model.norm.weight"


def make_mask(model: Any, *names: str) -> SafetyMask:
    shapes = {name: weight_shape(weight) for name, weight in named_weights(model).items() if name in names}
    return SafetyMask({name: torch.tensor([1, 3]) for name in shapes}, shapes)


def patch(model: Any, mask: SafetyMask) -> SafetyPatch:
    return SafetyPatch(
        mask, {name: torch.zeros(2) for name in mask.shapes}, {name: torch.ones(2) for name in mask.shapes}
    )


@pytest.mark.parametrize("kind", [*FOUR_BIT, "int8"])
@pytest.mark.parametrize(
    "act",
    [
        selected_parameters,
        snapshot_entries,
        lambda model, mask: CompactTraining(mask).attach(model, [torch.optim.AdamW(model.parameters())]),
        lambda model, mask: patch(model, mask).apply(model),
    ],
)
def test_packed_entries_are_refused(act: Callable[[Any, SafetyMask], object], kind: str) -> None:
    model = make_quantized_model(kind)
    with pytest.raises(
        ValueError, match=rf"1 of its tensors are quantised in the model, for instance `{UP}`: .*Load the"
    ):
        act(model, make_mask(model, UP, NORM))
    assert set(snapshot_entries(model, make_mask(model, NORM))) == {NORM}


def test_a_tensor_of_which_nothing_is_selected_may_be_quantised() -> None:
    model = make_quantized_model()
    mask = make_mask(model, UP, NORM)
    mask = SafetyMask({**mask.indices, UP: torch.tensor([], dtype=torch.int32)}, mask.shapes)
    assert [name for name, _, _ in selected_parameters(model, mask)] == [NORM]


@pytest.mark.parametrize("kind", [*FOUR_BIT, "int8"])
def test_what_holds_weights_leaves_packed_ones_alone(kind: str) -> None:
    model = make_quantized_model(kind)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    with WeightHolder(make_mask(model, UP, NORM)).attach(model, [optimizer]) as holder:
        for weight in model.parameters():
            weight.grad = None if is_quantized_weight(weight) else torch.ones_like(weight)
        optimizer.step()
        assert holder.bytes == 2 * (4 + 4)
        assert holder.verify() == 0
    assert all(
        same_bits(weight, before[name]) for name, weight in model.named_parameters() if is_quantized_weight(weight)
    )
    moved = model.get_parameter(NORM) != before[NORM]
    assert moved.nonzero().flatten().tolist() == [0, 2, *range(4, 64)]
