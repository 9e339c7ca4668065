# SPDX-License-Identifier: Apache-2.0
"""`WeightHolder` on plain torch. The matrix of optimizers, precisions and clipping is in tests/callbacks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_safety.enforcement import WeightHolder, hold
from lightning_safety.enforcement.entries import scatter_entries
from lightning_safety.scoring.mask import SafetyMask
from tests.enforcement.toys import Lion, bits, chosen, count_hooks, make_toy, toy_loss, toy_mask, train, weights_of


def assert_held(model: nn.Module, before: dict[str, torch.Tensor], mask: SafetyMask) -> None:
    """Held entries have the same bits, and of the free ones some have moved in every tensor."""
    for name, parameter in model.named_parameters():
        same = bits(parameter.detach()) == bits(before[name])
        held = chosen(mask, name, parameter.numel())
        assert same[held].all(), name
        assert not same[~held].all(), name


@pytest.mark.parametrize(
    "make",
    [
        lambda weights: torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.1),
        lambda weights: torch.optim.SGD(weights, lr=0.1, momentum=0.9, weight_decay=0.1),
        lambda weights: Lion(weights),
    ],
    ids=["adamw", "sgd", "lion"],
)
def test_held_weights_keep_their_bits_and_others_move(make) -> None:
    model, mask = make_toy(), toy_mask()
    optimizer = make(model.parameters())
    train(model, optimizer, steps=3)  # momentum from before holding moves weights whose gradient is zero
    before = weights_of(model)
    with WeightHolder(mask).attach(model, [optimizer]) as holder:
        train(model, optimizer, accumulate=2)
        assert holder.verify() == 0
    assert_held(model, before, mask)


def test_gradients_of_held_weights_are_zero_before_clipping_even_where_not_finite() -> None:
    model, mask = make_toy(), toy_mask()
    holder = WeightHolder(mask).attach(model, [])
    (model.middle.weight.sum() * float("nan")).backward()
    held = chosen(mask, "middle.weight", 64)
    assert model.middle.weight.grad.flatten()[held].tolist() == [0.0, 0.0]
    assert model.middle.weight.grad.flatten()[~held].isnan().all()
    model.middle.weight.grad = torch.full((8, 8), float("inf"))  # added by somebody else
    holder.mask_gradients()
    assert model.middle.weight.grad.flatten()[held].tolist() == [0.0, 0.0]


def test_gradients_are_gone_through_again_only_where_something_happened_to_them(monkeypatch) -> None:
    model, mask = make_toy(), toy_mask()
    holder = WeightHolder(mask).attach(model, [])
    written = []

    def scatter(tensor: torch.Tensor, indices: torch.Tensor, values: torch.Tensor | float) -> None:
        written.append(tensor.shape)
        scatter_entries(tensor, indices, values)

    monkeypatch.setattr(hold, "scatter_entries", scatter)
    toy_loss(model, 0).backward()
    selected = len(written)
    assert selected == sum(indices.numel() > 0 for indices in mask.indices.values())
    holder.mask_gradients(only_changed=True)
    assert len(written) == selected
    held = chosen(mask, "middle.weight", 64)
    weight = model.middle.weight
    for change in (
        lambda: weight.grad.add_(1.0),
        lambda: setattr(weight, "grad", weight.grad + 1),
        lambda: weight.grad.view(-1)[3:].add_(1.0),
        lambda: setattr(weight, "grad", torch.full_like(weight, float("nan"))),
    ):
        change()
        assert weight.grad.flatten()[held].tolist() != [0.0, 0.0]
        holder.mask_gradients(only_changed=True)
        assert weight.grad.flatten()[held].tolist() == [0.0, 0.0]
        written.clear()
        holder.mask_gradients(only_changed=True)
        assert written == []
    # This leaves no trace, so it takes going through all.
    weight.grad.data.add_(1.0)
    holder.mask_gradients()
    assert weight.grad.flatten()[held].tolist() == [0.0, 0.0]
    # Accumulated into once more, and in the next step.
    for clear in (False, True):
        if clear:
            model.zero_grad()
        toy_loss(model, 0).backward()
        assert weight.grad.flatten()[held].tolist() == [0.0, 0.0]


def test_values_with_odd_bits_are_held_and_verified() -> None:
    model, mask = make_toy(), toy_mask()
    with torch.no_grad():
        model.middle.weight.view(-1)[3:5] = torch.tensor([float("nan"), -0.0])
    holder = WeightHolder(mask).attach(model, [])
    assert holder.verify() == 0
    with torch.no_grad():
        model.middle.weight.view(-1)[4] = 0.0
        model.embedding.weight.view(-1)[5] += 1
    assert holder.verify() == 2
    holder.restore()
    assert holder.verify() == 0


def test_frozen_weights_are_held_once_they_are_unfrozen() -> None:
    model, mask = make_toy(), toy_mask()
    model.middle.weight.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    before = weights_of(model)
    with WeightHolder(mask).attach(model, [optimizer]):
        assert not model.middle.weight.requires_grad
        train(model, optimizer, steps=2)
        assert torch.equal(model.middle.weight, before["middle.weight"])
        model.middle.weight.requires_grad_(True)
        train(model, optimizer, steps=2)
        assert model.middle.weight.grad.flatten()[3:5].tolist() == [0.0, 0.0]
    assert_held(model, before, mask)


def test_each_of_several_optimizers_restores() -> None:
    model, mask = make_toy(), toy_mask()
    first = torch.optim.AdamW(model.embedding.parameters(), lr=0.1, weight_decay=0.5)
    second = torch.optim.SGD(model.middle.parameters(), lr=0.1, weight_decay=0.5)
    before = weights_of(model)
    with WeightHolder(mask).attach(model, [first, second]) as holder:
        for step in range(4):
            model.zero_grad()
            toy_loss(model, step).backward()
            (first if step % 2 else second).step()
            assert holder.verify() == 0
    assert_held(model, before, mask)


def test_parameters_without_gradient_or_optimizer_are_left_alone() -> None:
    model, mask = make_toy(), toy_mask()
    optimizer = torch.optim.SGD([model.middle.bias], lr=0.1)
    before = weights_of(model)
    with WeightHolder(mask).attach(model, [optimizer]) as holder:
        holder.mask_gradients()
        train(model, optimizer)
        assert holder.verify() == 0
    assert torch.equal(model.embedding.weight, before["embedding.weight"])


def test_sparse_gradient_is_refused() -> None:
    model = nn.Sequential(nn.Embedding(7, 4, sparse=True))
    mask = SafetyMask({"0.weight": torch.tensor([1])}, {"0.weight": (7, 4)})
    WeightHolder(mask).attach(model, [])
    with pytest.raises(RuntimeError, match=r"`0\.weight` expected to be dense but it is sparse.*sparse=False"):
        model(torch.tensor([1])).sum().backward()


def test_mask_of_another_model_is_refused_and_leaves_nothing_behind() -> None:
    model = make_toy()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    mask = SafetyMask({"middle.weigth": torch.tensor([1])}, {"middle.weigth": (8, 8)})
    with pytest.raises(ValueError, match=r"middle\.weight"):
        WeightHolder(mask).attach(model, [optimizer])
    assert count_hooks(model, optimizer) == 0


def test_optimizer_without_step_hooks_is_refused() -> None:
    class Quiet:
        def step(self) -> None: ...

    model = make_toy()
    with pytest.raises(TypeError, match=r"reports its steps but got .*Quiet"):
        WeightHolder(toy_mask()).attach(model, [Quiet()])  # type: ignore[list-item]
    assert count_hooks(model) == 0


def test_release_removes_every_hook_and_may_be_repeated() -> None:
    model, mask = make_toy(), toy_mask()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    holder = WeightHolder(mask).attach(model, [optimizer])
    assert count_hooks(model, optimizer) == 3
    assert holder.bytes == 5 * (4 + 4)
    holder.attach(model, [optimizer])
    assert count_hooks(model, optimizer) == 3
    holder.release()
    holder.release()
    assert count_hooks(model, optimizer) == 0
    before = weights_of(model)
    train(model, optimizer)
    assert not torch.equal(model.middle.weight.flatten()[3:5], before["middle.weight"].flatten()[3:5])


def test_error_inside_with_releases() -> None:
    model = make_toy()
    with pytest.raises(KeyboardInterrupt), WeightHolder(toy_mask()).attach(model, []):
        raise KeyboardInterrupt
    assert count_hooks(model) == 0


def test_parameters_are_found_by_name_behind_wrappers_and_after_replacement() -> None:
    model, mask = make_toy(), toy_mask()
    holder = WeightHolder(mask)
    compiled = torch.compile(model, backend="eager")
    optimizer = torch.optim.AdamW(compiled.parameters(), lr=0.1)
    before = weights_of(model)
    with holder.attach(compiled, [optimizer]):
        train(compiled, optimizer)
    assert_held(model, before, mask)
    model.middle = nn.Linear(8, 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    before = weights_of(model)
    with holder.attach(model, [optimizer]):
        train(model, optimizer)
    assert_held(model, before, mask)
