# SPDX-License-Identifier: Apache-2.0
"""`CompactTraining` on plain torch against dense training with masked gradients."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_safety.enforcement import CompactTraining
from lightning_safety.scoring.mask import SafetyMask
from tests.enforcement.toys import Lion, bits, chosen, count_hooks, make_toy, toy_loss, toy_mask, train, weights_of

MakeOptimizer = Callable[[Any], torch.optim.Optimizer]
OPTIMIZERS: dict[str, MakeOptimizer] = {
    "adamw": lambda weights: torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.1),
    "adamw-foreach": lambda weights: torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.1, foreach=True),
    "adamw-fused": lambda weights: torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.1, fused=True),
    "adamw-amsgrad": lambda weights: torch.optim.AdamW(weights, lr=1e-2, amsgrad=True),
    "sgd": lambda weights: torch.optim.SGD(weights, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adagrad": lambda weights: torch.optim.Adagrad(weights, lr=0.1, initial_accumulator_value=0.1),
    "rmsprop": lambda weights: torch.optim.RMSprop(weights, lr=1e-2, momentum=0.5),
    "lion": Lion,
}


def train_dense(
    model: nn.Module, mask: SafetyMask, optimizer: torch.optim.Optimizer, steps: int, accumulate: int
) -> None:
    """The reference: all weights in the optimizer, unselected gradients zeroed, unselected values put back."""
    fixed = {name: ~chosen(mask, name, weight.numel()).view_as(weight) for name, weight in model.named_parameters()}
    for step in range(steps):
        optimizer.zero_grad()
        for micro in range(accumulate):
            toy_loss(model, accumulate * step + micro).backward()
        before = weights_of(model)
        for name, weight in model.named_parameters():
            weight.grad[fixed[name]] = 0.0
        optimizer.step()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                weight.copy_(torch.where(fixed[name], before[name], weight))


def assert_same_bits(model: nn.Module, other: nn.Module) -> None:
    for (name, left), right in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(bits(left.detach()), bits(right.detach())), name


def assert_only_selected_moved(model: nn.Module, before: dict[str, torch.Tensor], mask: SafetyMask) -> None:
    for name, parameter in model.named_parameters():
        same = bits(parameter.detach()) == bits(before[name])
        selected = chosen(mask, name, parameter.numel())
        assert same[~selected].all(), name
        assert not same[selected].any(), name


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_equals_dense_masked_training_bit_for_bit(name: str, dtype: torch.dtype, accumulate: int) -> None:
    mask = toy_mask()
    dense, model = make_toy().to(dtype), make_toy().to(dtype)
    before = weights_of(model)
    train_dense(dense, mask, OPTIMIZERS[name](dense.parameters()), 6, accumulate)
    optimizer = OPTIMIZERS[name](model.parameters())
    with CompactTraining(mask).attach(model, [optimizer]):
        train(model, optimizer, 6, accumulate)
    assert_same_bits(model, dense)
    if dtype == torch.float32:
        assert_only_selected_moved(model, before, mask)


def test_optimizer_and_gradients_take_memory_for_selected_weights_only() -> None:
    model, mask = make_toy(), toy_mask()
    optimizer = torch.optim.AdamW(model.parameters())
    with CompactTraining(mask).attach(model, [optimizer]) as training:
        train(model, optimizer, steps=1)
        assert [weight.grad for weight in model.parameters()] == [None] * 3
        held = optimizer.param_groups[0]["params"]
        assert [weight.shape for weight in held] == [(64,), (64,)]  # whole vectors
        assert [optimizer.state[weight]["exp_avg"].numel() for weight in held] == [64, 64]
        assert training.bytes == 5 * 4 + 128 * 4
    assert all(weight.requires_grad for weight in model.parameters())
    assert count_hooks(model, optimizer) == 0


def test_groups_keep_their_settings_and_schedulers_their_groups() -> None:
    mask = toy_mask()
    dense, model = make_toy(), make_toy()

    def groups(toy: nn.Module) -> list[dict[str, Any]]:
        return [
            {"params": [("bias", toy.middle.bias)], "lr": 0.5},  # selects nothing: an empty group must stay
            {"params": [("middle", toy.middle.weight)], "lr": 0.1, "weight_decay": 0.3},
            {"params": [("embedding", toy.embedding.weight)], "lr": 0.01, "weight_decay": 0.0},
        ]

    rates = []
    for toy in (dense, model):
        optimizer = torch.optim.AdamW(groups(toy))
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda s: 0.5**s, lambda s: 0.5**s, lambda s: 2.0**s])
        training = CompactTraining(mask)
        if toy is model:
            training.attach(toy, [optimizer])
        for _ in range(4):
            if toy is model:
                train(toy, optimizer, 1)
            else:
                train_dense(toy, mask, optimizer, 1, 1)
            scheduler.step()
        rates.append([group["lr"] for group in optimizer.param_groups])
    assert_same_bits(model, dense)
    assert rates[0] == rates[1] == [0.5 / 16, 0.1 / 16, 0.01 * 16]
    assert [group["param_names"] for group in optimizer.param_groups] == [[], ["middle.weight"], ["embedding.weight"]]


def test_state_is_saved_and_loaded_for_selected_weights() -> None:
    mask = toy_mask()
    whole, model = make_toy(), make_toy()
    optimizer = torch.optim.AdamW(whole.parameters(), lr=1e-2)
    with CompactTraining(mask).attach(whole, [optimizer]):
        train(whole, optimizer, 3)
        saved, weights = deepcopy(optimizer.state_dict()), weights_of(whole)
        train(whole, optimizer, 3)
    model.load_state_dict(weights, strict=False)
    model.head.weight = model.embedding.weight
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with CompactTraining(mask).attach(model, [optimizer]):
        optimizer.load_state_dict(saved)
        train(model, optimizer, 3)
    assert_same_bits(model, whole)


def test_state_from_dense_training_is_carried_over() -> None:
    mask = toy_mask()
    dense, model = make_toy(), make_toy()
    for toy in (dense, model):
        optimizer = torch.optim.AdamW(toy.parameters(), lr=1e-2)
        train(toy, optimizer, 2)
        if toy is dense:
            train_dense(toy, mask, optimizer, 3, 1)
        else:
            with CompactTraining(mask).attach(toy, [optimizer]):
                train(toy, optimizer, 3)
    assert_same_bits(model, dense)


def test_several_optimizers_train_their_own_weights() -> None:
    model, mask = make_toy(), toy_mask()
    first = torch.optim.AdamW(model.embedding.parameters(), lr=0.1)
    second = torch.optim.SGD(model.middle.parameters(), lr=0.1)
    before = weights_of(model)
    with CompactTraining(mask).attach(model, [first, second]):
        for step in range(4):
            first.zero_grad()
            second.zero_grad()
            toy_loss(model, step).backward()
            (first if step % 2 else second).step()
    assert_only_selected_moved(model, before, mask)


def test_norm_clip_and_scaler_see_selected_gradients_only() -> None:
    model, mask = make_toy(), toy_mask()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    with CompactTraining(mask).attach(model, [optimizer]):
        scaler.scale(toy_loss(model, 0)).backward()
        scaler.unscale_(optimizer)
        compact = optimizer.param_groups[0]["params"]
        norm = torch.nn.utils.clip_grad_norm_(compact, 1e-3)
        scaler.step(optimizer)
    twin = make_toy()
    toy_loss(twin, 0).backward()
    selected = [w.grad.flatten()[chosen(mask, n, w.numel())] for n, w in twin.named_parameters()]
    assert norm == pytest.approx(torch.cat(selected).norm().item(), rel=1e-5)


def test_infinite_gradient_elsewhere_does_not_skip_the_step() -> None:
    model, mask = make_toy(), toy_mask()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    before = weights_of(model)
    with CompactTraining(mask).attach(model, [optimizer]):
        factor = torch.ones(8, 8)
        factor[3, 3] = float("inf")
        scaler.scale((model.middle.weight * factor).sum() + model.embedding.weight.sum()).backward()
        scaler.step(optimizer)
    assert not torch.equal(model.middle.weight, before["middle.weight"])


def test_weights_changed_by_others_are_taken_over_by_refresh() -> None:
    model, mask = make_toy(), toy_mask()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = weights_of(model)
    with CompactTraining(mask).attach(model, [optimizer]) as training:
        train(model, optimizer, 2)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(before[name])
        training.refresh()
        optimizer.zero_grad()
        optimizer.step()
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, before[name])


class Checkpointed(nn.Module):
    """Embedding and two checkpointed blocks; only the second block has selected weights."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.first, self.second = nn.Embedding(16, 8), nn.Linear(8, 8), nn.Linear(8, 16)
        self.use_reentrant = use_reentrant

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = checkpoint(
            lambda x: torch.tanh(self.first(x)), self.embedding(tokens), use_reentrant=self.use_reentrant
        )
        return checkpoint(self.second, hidden, use_reentrant=self.use_reentrant)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_works_with_nothing_selected_in_the_embedding(use_reentrant: bool) -> None:
    mask = SafetyMask(
        {"first.weight": torch.tensor([2]), "second.weight": torch.tensor([3])},
        {"first.weight": (8, 8), "second.weight": (16, 8)},
    )
    dense, model = Checkpointed(use_reentrant), Checkpointed(use_reentrant)
    before = weights_of(model)
    train_dense(dense, mask, torch.optim.AdamW(dense.parameters(), lr=1e-2), 3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with CompactTraining(mask).attach(model, [optimizer]):
        train(model, optimizer, 3, 2)
    assert_same_bits(model, dense)
    assert_only_selected_moved(model, before, mask)


def test_parameters_outside_the_model_but_in_the_optimizer_stand_still() -> None:
    model, value_head = make_toy(), nn.Linear(16, 1)
    optimizer = torch.optim.AdamW([*model.parameters(), *value_head.parameters()], lr=0.1)
    before = weights_of(value_head)
    with CompactTraining(toy_mask()).attach(model, [optimizer]):
        value_head(model(torch.tensor([1, 2]))).sum().backward()
        assert value_head.weight.grad is None
        optimizer.step()
    assert torch.equal(value_head.weight, before["weight"])


def test_parameters_without_selected_entries_are_out_of_the_backward_pass() -> None:
    model = make_toy()
    model.middle.weight.requires_grad_(False)
    mask = SafetyMask({"middle.bias": torch.tensor([1])}, {"middle.bias": (8,)})
    with CompactTraining(mask).attach(model, [torch.optim.SGD(model.parameters(), lr=0.1)]):
        assert not model.embedding.weight.requires_grad
        toy_loss(model, 0).backward()
        assert model.embedding.weight.grad is None
    assert model.embedding.weight.requires_grad
    assert not model.middle.weight.requires_grad  # was so before


def test_reentrant_checkpointing_right_above_unselected_parameters() -> None:
    class Checkpointed(nn.Sequential):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            hidden = torch.tanh_(self[0](tokens))  # in place: the output must not be a leaf
            return self[2](checkpoint(self[1], hidden, use_reentrant=True))

    def build() -> Checkpointed:
        torch.manual_seed(0)
        return Checkpointed(nn.Embedding(16, 8), nn.Linear(8, 8), nn.Linear(8, 16))

    mask = SafetyMask({"1.weight": torch.arange(9)}, {"1.weight": (8, 8)})
    dense, model = build(), build()
    train_dense(dense, mask, torch.optim.AdamW(dense.parameters(), lr=1e-2), 3, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = weights_of(model)
    with CompactTraining(mask).attach(model, [optimizer]):
        train(model, optimizer, 3)
    assert_same_bits(model, dense)
    assert_only_selected_moved(model, before, mask)


def test_toggled_off_parameters_take_no_gradient() -> None:
    model, mask = make_toy(), toy_mask()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with CompactTraining(mask).attach(model, [optimizer]):
        embedding, middle = optimizer.param_groups[0]["params"]
        middle.requires_grad_(False)
        toy_loss(model, 0).backward()
        assert embedding.grad is not None
        assert middle.grad is None
