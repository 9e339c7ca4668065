# SPDX-License-Identifier: Apache-2.0
"""Noise is as large as said, where it was asked for, and gone afterwards to the last bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_safety.enforcement import perturbed_weights
from lightning_safety.scoring import SafetyMask, scored_weights, select_random
from tests.tiny import make_tiny_model


def masked(model: nn.Module, fraction: float) -> SafetyMask:
    return select_random({name: weight.detach() for name, weight in scored_weights(model).items()}, fraction, 0)


def copies(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_selected_entries_move_and_all_come_back(dtype):
    model = make_tiny_model().to(dtype)
    mask, before = masked(model, 0.3), copies(model)
    with perturbed_weights(model, mask):
        during = copies(model)
    for name, weight in during.items():
        moved = (weight != before[name]).flatten().nonzero().flatten()
        selected = mask.indices.get(name, torch.empty(0, dtype=torch.int32)).long()
        assert set(moved.tolist()) <= set(selected.tolist())
        # In bfloat16 a little noise is lost to rounding.
        assert len(moved) >= 0.9 * len(selected)
    assert all(torch.equal(weight, before[name]) for name, weight in copies(model).items())


def test_noise_is_so_many_standard_deviations_of_the_tensor():
    model = nn.Module()
    model.head = nn.Linear(400, 300, bias=False)
    torch.manual_seed(0)
    with torch.no_grad():
        model.head.weight.normal_(3.0, 0.5)
    before = model.head.weight.detach().clone()
    mask = SafetyMask({"head.weight": torch.arange(0, 120_000, 2)}, {"head.weight": (300, 400)})
    with perturbed_weights(model, mask, noise=0.38, seed=1):
        moved = (model.head.weight.detach() - before).flatten()[::2]
    assert float(moved.std()) == pytest.approx(0.38 * 0.5, rel=0.02)
    assert float(moved.mean()) == pytest.approx(0, abs=0.005)


def test_experts_get_noise_by_their_own_spread():
    model = nn.Module()
    model.experts = nn.Module()
    weight = torch.stack([torch.randn(100, 50), 10 * torch.randn(100, 50)])
    model.experts.down = nn.Parameter(weight.clone())
    mask = SafetyMask({"experts.down": torch.arange(10_000)}, {"experts.down": (2, 100, 50)})
    with perturbed_weights(model, mask):
        moved = model.experts.down.detach() - weight
    assert float(moved[1].std() / moved[0].std()) == pytest.approx(10, rel=0.1)


def test_seeds_differ_and_repeat():
    model = make_tiny_model()
    mask, found = masked(model, 0.1), []
    for seed in (0, 0, 1):
        with perturbed_weights(model, mask, seed=seed):
            found.append(torch.cat([weight.flatten() for weight in copies(model).values()]))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_an_error_in_the_block_leaves_no_noise():
    model = make_tiny_model()
    before = copies(model)
    with pytest.raises(KeyboardInterrupt), perturbed_weights(model, masked(model, 0.5)):
        raise KeyboardInterrupt
    assert all(torch.equal(weight, before[name]) for name, weight in copies(model).items())


@pytest.mark.parametrize("noise", [-0.1, float("nan"), float("inf")])
def test_noise_out_of_range_is_refused(noise):
    model = make_tiny_model()
    with (
        pytest.raises(ValueError, match="`noise` expected to be a number in"),
        perturbed_weights(model, masked(model, 0.1), noise=noise),
    ):
        pass
