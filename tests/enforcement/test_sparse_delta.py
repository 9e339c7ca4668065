# SPDX-License-Identifier: Apache-2.0
"""`SparseDelta` on frozen bases, with and without adapters; quantised ones are in test_sparse_delta_quantized.py."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from lightning_safety.enforcement import CompactTraining, SparseDelta, matrix_entries
from lightning_safety.language import named_weights
from lightning_safety.scoring import SafetyMask
from tests.enforcement.adapters import loss_of, relative_distance
from tests.enforcement.deltas import (
    BASES,
    OPTIMIZERS,
    count_traces,
    logits_of,
    make_base,
    make_mask,
    train,
    train_dense,
)
from tests.enforcement.toys import bits
from tests.tiny import make_tiny_model


@pytest.fixture(params=[0.0, 1.0], ids=["dense products", "sparse products"])
def _either_form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix_entries, "_DENSE_FROM", request.param)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """All parameters, frozen or not, as a user may pass them."""
    return OPTIMIZERS["adamw"](model.parameters())


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in named_weights(model).items()}


def assert_only_selected_differ(model: nn.Module, before: dict[str, torch.Tensor], mask: SafetyMask) -> None:
    """No other bit differs, and of every tensor with selected weights some of these do."""
    for name, weight in named_weights(model).items():
        changed = bits(weight.detach()) != bits(before[name])
        selected = torch.zeros_like(changed)
        selected[mask.indices.get(name, torch.tensor([])).long()] = True
        assert not changed[~selected].any(), name
        assert bool(changed[selected].any()) == bool(selected.any()), name


@pytest.mark.usefixtures("_either_form")
@pytest.mark.parametrize("kind", BASES)
def test_trains_as_dense_masked_training(kind: str) -> None:
    model = make_base(kind)
    mask = make_mask(model)
    before, flags = weights_of(model), [weight.requires_grad for weight in model.parameters()]
    dense = train_dense(model, mask, OPTIMIZERS["adamw"])
    optimizer = adamw(model)
    delta = SparseDelta(mask).attach(model, [optimizer])
    train(model, optimizer)
    during = logits_of(model)
    delta.settle()
    expected = named_weights(dense)
    for name, weight in named_weights(model).items():
        assert relative_distance(weight.detach(), expected[name].detach()) <= 1e-5, name
        # What was learned, not only where it began.
        learned = expected[name].detach() - before[name]
        assert relative_distance(weight.detach() - before[name], learned) <= 1e-4, name
    assert_only_selected_differ(model, before, mask)
    assert torch.equal(logits_of(model), during)
    assert relative_distance(during, logits_of(dense)) <= 1e-5
    assert [weight.requires_grad for weight in model.parameters()] == flags
    assert count_traces(model, optimizer) == 0


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_trains_as_compact_training_of_the_unfrozen_model(name: str) -> None:
    model, unfrozen = make_base("frozen"), make_tiny_model()
    mask = make_mask(model)
    before = weights_of(model)
    for trained, training in ((model, SparseDelta(mask)), (unfrozen, CompactTraining(mask))):
        optimizer = OPTIMIZERS[name](trained.parameters())
        training.attach(trained, [optimizer])
        train(trained, optimizer)
    expected = named_weights(unfrozen)
    for key, weight in named_weights(model).items():
        assert relative_distance(weight, expected[key].detach()) <= 1e-5, key
    assert_only_selected_differ(model, before, mask)


def test_in_float64_nothing_but_its_rounding_differs() -> None:
    model = make_base("LoRA, trained").double()
    mask = make_mask(model)
    dense = train_dense(model, mask, OPTIMIZERS["adamw"])
    optimizer = adamw(model)
    delta = SparseDelta(mask).attach(model, [optimizer])
    train(model, optimizer)
    expected = weights_of(dense)
    assert all(values.dtype == torch.float64 for values in delta.entries().values())
    assert all(relative_distance(weight, expected[name]) <= 1e-12 for name, weight in weights_of(model).items())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_over_a_frozen_embedding(use_reentrant: bool) -> None:
    model = make_base("frozen").train()
    mask = make_mask(model)
    reference = copy.deepcopy(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.disable_input_require_grads()  # which models outside of transformers do not have
    for trained in (model, reference):
        optimizer = adamw(trained)
        SparseDelta(mask).attach(trained, [optimizer])
        train(trained, optimizer, 3)
    expected = weights_of(reference)
    assert all(torch.equal(weight, expected[name]) for name, weight in weights_of(model).items())


def test_compiled() -> None:
    model = make_tiny_model(num_hidden_layers=1).requires_grad_(False)
    mask = make_mask(model, include=["*.up_proj.*", "*.v_proj.*"])
    reference = copy.deepcopy(model)
    model.forward = torch.compile(model.forward, backend="aot_eager")
    for trained in (model, reference):
        optimizer = adamw(trained)
        SparseDelta(mask).attach(trained, [optimizer])
        train(trained, optimizer, 2)
    expected = weights_of(reference)
    assert all(relative_distance(weight, expected[name]) <= 1e-5 for name, weight in weights_of(model).items())


def test_steps_too_small_for_bfloat16_add_up() -> None:
    model = make_base("frozen").to(torch.bfloat16)
    mask = make_mask(model)
    before = weights_of(model)
    rates = []
    for make in (SparseDelta, CompactTraining):
        trained = copy.deepcopy(model).requires_grad_(make is CompactTraining)
        optimizer = torch.optim.AdamW(trained.parameters(), lr=2e-5, weight_decay=0.0)
        training = make(mask).attach(trained, [optimizer])
        train(trained, optimizer, 12)
        moved = {name: int((bits(w) != bits(before[name])).sum()) for name, w in weights_of(trained).items()}
        rates.append(sum(moved.values()) / mask.count)
        if make is SparseDelta:
            for name, values in training.entries().items():
                assert values.dtype == torch.float32
                held = named_weights(trained)[name].detach().flatten()[mask.indices[name].long()]
                assert torch.equal(held, values.to(torch.bfloat16))
    assert rates[0] > 1.5 * rates[1]


def test_what_the_optimizer_holds_and_how_much_memory_it_takes() -> None:
    model = make_base("LoRA")
    mask = make_mask(model)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad])
    delta = SparseDelta(mask).attach(model, [optimizer])
    train(model, optimizer, 1)
    held = [weight for group in optimizer.param_groups for weight in group["params"]]
    selected = {name: index for name, index in mask.indices.items() if index.numel()}
    assert [weight.shape for weight in held] == [index.shape for index in selected.values()]
    assert {weight.dtype for weight in held} == {torch.float32}
    assert all(weight.grad is None and not weight.requires_grad for weight in model.parameters())
    assert 16 * mask.count < delta.bytes < 24 * mask.count


def test_groups_and_their_names_stay() -> None:
    model = make_base("frozen")
    mask = make_mask(model, include=["*down_proj*", "*up_proj*", "*gate_proj*"])
    mask = SafetyMask({name: index[:5] for name, index in mask.indices.items()}, mask.shapes)
    named = dict(model.named_parameters())
    groups: list[dict[str, Any]] = [
        {"params": [("norm", named["model.norm.weight"])], "lr": 0.5},
        {"params": [(name, weight) for name, weight in named.items() if "down" in name], "lr": 0.1},
        {"params": [(name, weight) for name, weight in named.items() if "up" in name], "lr": 0.01},
    ]
    optimizer = torch.optim.SGD(groups)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda step: 0.5**step] * 3)
    SparseDelta(mask).attach(model, [optimizer])
    before = weights_of(model)
    train(model, optimizer, 1)
    scheduler.step()
    layers = [f"model.layers.{layer}.mlp" for layer in (0, 1)]
    # Weights of no group go to the first one; of the first tensor the mask selects none.
    assert [group["param_names"] for group in optimizer.param_groups] == [
        [name for name in (f"{layer}.gate_proj.weight" for layer in layers) if mask.indices[name].numel()],
        [f"{layer}.down_proj.weight" for layer in layers],
        [f"{layer}.up_proj.weight" for layer in layers],
    ]
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.05, 0.005]
    for group in optimizer.param_groups:
        for name, values in zip(group["param_names"], group["params"], strict=True):
            moved = (named[name].detach() - before[name]).flatten()[mask.indices[name].long()]
            assert relative_distance(moved, -2 * group["lr"] * values.grad) < 1e-3


def test_parameters_outside_the_model_stand_still_and_keep_no_gradient() -> None:
    model, value_head = make_base("LoRA"), nn.Linear(512, 1)
    optimizer = torch.optim.AdamW([*model.parameters(), *value_head.parameters()], lr=0.1)
    before = value_head.weight.detach().clone()
    with SparseDelta(make_mask(model)).attach(model, [optimizer]):
        for _ in range(2):
            value_head(model(torch.tensor([[5, 6]])).logits).sum().backward()
            assert value_head.weight.grad is None
            optimizer.step()
    assert torch.equal(value_head.weight, before)
    assert value_head.weight.requires_grad


def test_release_gives_the_base_back_bit_for_bit() -> None:
    model = make_base("LoRA")
    mask = make_mask(model)
    name = next(name for name, index in mask.indices.items() if index.numel())
    with torch.no_grad():
        named_weights(model)[name].view(-1)[mask.indices[name][0]] = -0.0
    before, flags = weights_of(model), [weight.requires_grad for weight in model.parameters()]
    optimizer = adamw(model)
    with SparseDelta(mask).attach(model, [optimizer]) as delta:
        assert all(torch.equal(bits(weight), bits(before[key])) for key, weight in weights_of(model).items())
        train(model, optimizer, 2)
    delta.release()
    delta.settle()
    assert all(torch.equal(bits(weight), bits(before[key])) for key, weight in weights_of(model).items())
    assert [weight.requires_grad for weight in model.parameters()] == flags
    assert count_traces(model, optimizer) == 0


def test_write_refresh_and_rewind() -> None:
    model = make_base("frozen")
    mask = make_mask(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    delta = SparseDelta(mask).attach(model, [optimizer])
    start = weights_of(model)
    train(model, optimizer, 1)
    trained, entries = weights_of(model), delta.entries()
    delta.rewind()
    assert all(torch.equal(weight, start[name]) for name, weight in weights_of(model).items())
    delta.write(entries)
    assert all(torch.equal(weight, trained[name]) for name, weight in weights_of(model).items())
    model.load_state_dict(start, strict=False)
    delta.refresh()
    optimizer.zero_grad()
    optimizer.step()
    assert all(torch.equal(weight, start[name]) for name, weight in weights_of(model).items())


def test_begins_with_what_it_is_given() -> None:
    """Whatever the model holds at these places: a checkpoint of adapters is loaded into any base."""
    model, other = make_base("frozen"), make_base("frozen")
    mask = make_mask(model)
    before = weights_of(model)
    optimizer = adamw(model)
    delta = SparseDelta(mask).attach(model, [optimizer])
    train(model, optimizer, 2)
    again = SparseDelta(mask).attach(other, [adamw(other)], trained=delta.entries(), before=delta.before)
    assert torch.equal(logits_of(other), logits_of(model))
    patch = again.patch({"made_by": "test"})
    again.release()
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(other).items())
    patch.apply(other)
    assert torch.equal(logits_of(other), logits_of(model))
    third = SparseDelta(mask).apply(make_base("frozen"), delta.entries())
    assert third.entries() == {}


def test_layers_called_by_keyword_changed_in_place_or_given_nothing() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.called, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return self.called(input=inputs).mul_(2).sum() + self.unused(inputs[:0]).sum()

    torch.manual_seed(0)
    model = Odd().requires_grad_(False)
    mask = SafetyMask(
        {f"{name}.weight": torch.tensor([2, 5]) for name in ("called", "unused")},
        {f"{name}.weight": (4, 4) for name in ("called", "unused")},
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = model.called.weight.clone()
    delta = SparseDelta(mask).attach(model, [optimizer])
    model(torch.ones(3, 4)).backward()
    optimizer.step()
    assert (model.called.weight - before).flatten()[[2, 5]].tolist() == pytest.approx([-6.0, -6.0])
    assert delta.idle == ["unused.weight"]


def test_toggled_off_values_take_no_gradient() -> None:
    model = make_base("frozen")
    optimizer = adamw(model)
    SparseDelta(make_mask(model)).attach(model, [optimizer])
    first, second = optimizer.param_groups[0]["params"][:2]
    second.requires_grad_(False)
    loss_of(model).backward()
    assert first.grad is not None
    assert second.grad is None
