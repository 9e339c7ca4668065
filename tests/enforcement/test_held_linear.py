# SPDX-License-Identifier: Apache-2.0
"""Where the held product is taken out: within that of the base layer, or beside it where the base cannot do it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_safety.enforcement import held_lora
from lightning_safety.enforcement.held_lora import HeldLora
from tests.enforcement.adapters import gradients_of, loss_of, make_adapted_model, make_mask


def _products_beside(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the sparse products that are taken beside the base layer's."""
    taken: list[int] = []
    beside = held_lora.add_sparse_product

    def counted(*arguments: Any) -> torch.Tensor:
        taken.append(1)
        return beside(*arguments)

    monkeypatch.setattr(held_lora, "add_sparse_product", counted)
    return taken


def test_within_the_base_no_product_is_taken_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held_lora, "_TOKENS_WITHIN", 1)
    taken = _products_beside(monkeypatch)
    model = make_adapted_model(trained=True)
    with HeldLora(make_mask(model)).attach(model, continued=True):
        gradients_of(model)
    assert not taken


@pytest.mark.parametrize(
    ("options", "change"),
    [
        ({"lora_dropout": 0.1}, lambda model: model),
        ({}, lambda model: model.to(torch.bfloat16)),
        ({}, lambda model: model.base_model.model.model.layers.requires_grad_(True)),
    ],
    ids=["dropout", "half precision", "a base that trains"],
)
def test_where_the_base_cannot_do_it_products_are_taken_beside_it(
    options: dict[str, Any], change: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(held_lora, "_TOKENS_WITHIN", 1)
    taken = _products_beside(monkeypatch)
    model = make_adapted_model(trained=True, **options)
    change(model)
    holder = HeldLora(make_mask(model)).attach(model, continued=True)
    loss_of(model)
    assert len(taken) == holder.layers
