# SPDX-License-Identifier: Apache-2.0
"""Gradients by hooks are those of autograd, come one at a time, and leave no trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedTokenizerFast

from lightning_safety.scoring import RefusalMargin, scored_weights
from lightning_safety.scoring.layer_gradients import WeightGradients
from tests.quantized import relative_error
from tests.tiny import make_tiny_model

IDS = torch.arange(5, 29).view(3, 8)


def by_hooks(weight: nn.Parameter) -> bool:
    return True


def by_autograd(weight: nn.Parameter) -> bool:
    return False


def gradients_of(
    model: nn.Module, loss: Callable[[], Tensor], by_layer: Callable[[nn.Parameter], bool]
) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}

    def receive(name: str, gradient: Tensor) -> None:
        assert name not in found
        found[name] = gradient.detach().clone()

    with WeightGradients(model, scored_weights(model), receive, by_layer=by_layer) as gradients:
        gradients.backward(loss())
    return found


def assert_same_gradients(model: nn.Module, loss: Callable[[], Tensor]) -> None:
    expected, found = gradients_of(model, loss, by_autograd), gradients_of(model, loss, by_hooks)
    assert expected.keys() == found.keys() == scored_weights(model).keys()
    for name, gradient in expected.items():
        assert float(gradient.norm()) > 0, name
        assert relative_error(found[name], gradient) <= 1e-5, name


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("adapted", [False, True])
def test_hooks_give_the_gradients_of_autograd(
    frozen: bool, adapted: bool, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model: Any = make_tiny_model(tie_word_embeddings=False)
    plain = make_tiny_model(tie_word_embeddings=False)
    objective = RefusalMargin(limit=4)
    (batch,) = objective.batches(tiny_tokenizer, batch_size=4)
    if adapted:
        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear")).eval()
    model.requires_grad_(not frozen)
    assert_same_gradients(model, lambda: objective.loss(model, batch))
    # Adapters change nothing at their start.
    expected = gradients_of(plain, lambda: objective.loss(plain, batch), by_autograd)
    for name, gradient in gradients_of(model, lambda: objective.loss(model, batch), by_hooks).items():
        assert relative_error(gradient, expected[name]) <= 1e-5


class Twice(nn.Module):
    """A layer used two times, one used for nothing, one never, and one that is called by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.named = nn.Linear(4, 4), nn.Linear(4, 4)
        self.unused, self.aside = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.shared(inputs).tanh()
        self.aside(hidden), self.shared(hidden)
        return self.named(input=self.shared(hidden).tanh()).pow(2).sum()


@pytest.mark.parametrize("shape", [(4,), (5, 4), (2, 5, 4)])
def test_all_uses_of_a_layer_are_added_up(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model, inputs = Twice(), torch.randn(shape)
    expected = gradients_of(model, lambda: model(inputs), by_autograd)
    found = gradients_of(model, lambda: model(inputs), by_hooks)
    assert expected.keys() == found.keys() == {"shared.weight", "named.weight"}
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)


class Checkpointed(nn.Module):
    def __init__(self, *, use_reentrant: bool = False) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant
        self.embed = nn.Embedding(30, 4)
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)) for _ in range(3)])
        self.head = nn.Linear(4, 1)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embed(ids)
        for layer in self.layers:
            hidden = checkpoint(layer, hidden, use_reentrant=self.use_reentrant)
        output: Tensor = self.head(hidden).pow(2).sum()
        return output


@pytest.mark.parametrize("frozen", [False, True])
def test_checkpointed_layers_are_counted_once(frozen: bool) -> None:
    torch.manual_seed(0)
    model = Checkpointed().requires_grad_(not frozen)
    assert_same_gradients(model, lambda: model(IDS))


@pytest.mark.parametrize("by_layer", [by_hooks, by_autograd])
@pytest.mark.parametrize("frozen", [False, True])
def test_reentrant_checkpoints_are_refused(frozen: bool, by_layer: Any) -> None:
    model = Checkpointed(use_reentrant=True).requires_grad_(not frozen)
    with pytest.raises(RuntimeError, match="Reentrant gradient checkpointing hides the weights"):
        gradients_of(model, lambda: model(IDS), by_layer)


def test_checkpointing_of_transformers(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_tiny_model()
    expected = gradients_of(model, lambda: model(input_ids=IDS, labels=IDS).loss, by_autograd)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    for by_layer in (by_hooks, by_autograd):
        found = gradients_of(model, lambda: model(input_ids=IDS, labels=IDS).loss, by_layer)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            assert relative_error(found[name], gradient) <= 1e-5


@pytest.mark.parametrize("by_layer", [by_hooks, by_autograd])
def test_one_gradient_is_held_at_a_time(by_layer: Any) -> None:
    model = make_tiny_model(num_hidden_layers=4).requires_grad_(False)
    memory: list[StorageWeakRef] = []
    alive: list[int] = []

    def receive(name: str, gradient: Tensor) -> None:
        alive.append(sum(not reference.expired() for reference in memory))
        memory.append(StorageWeakRef(gradient.untyped_storage()))

    with WeightGradients(model, scored_weights(model), receive, by_layer=by_layer) as gradients:
        gradients.backward(model(input_ids=IDS, labels=IDS).loss)
    assert len(alive) == 28
    assert max(alive) <= 1


def test_what_went_into_a_layer_is_freed_as_soon_as_it_has_been_used() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5))).requires_grad_(False)
    entered: list[StorageWeakRef] = []
    alive: list[int] = []
    for layer in model:
        layer.register_forward_pre_hook(lambda _, args: entered.append(StorageWeakRef(args[0].untyped_storage())))

    def receive(name: str, gradient: Tensor) -> None:
        alive.append(sum(not reference.expired() for reference in entered))

    with WeightGradients(model, scored_weights(model), receive, by_layer=by_hooks) as gradients:
        loss = model(torch.randn(2, 4)).sum()
        gradients.backward(loss)
    assert alive == [5, 4, 3, 2, 1]


def test_other_backward_passes_inside_count_for_nothing() -> None:
    torch.manual_seed(0)
    model, inputs = Twice(), torch.randn(3, 4)

    def loss() -> Tensor:
        model(inputs).backward()
        value: Tensor = model(inputs)
        torch.autograd.grad(value, [model.named.weight, model.shared.bias], retain_graph=True, allow_unused=True)
        return value

    for by_layer in (by_hooks, by_autograd):
        expected = gradients_of(model, lambda: model(inputs), by_layer)
        model.requires_grad_(True)
        found = gradients_of(model, loss, by_layer)
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient)


def hooks_of(model: nn.Module) -> int:
    modules = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    return modules + sum(len(weight._backward_hooks or ()) for weight in model.parameters())


@pytest.mark.parametrize("by_layer", [by_hooks, by_autograd])
@pytest.mark.parametrize("failure", [None, "loss", "receive", "entering"])
def test_no_trace_is_left(failure: str | None, by_layer: Any) -> None:
    model = make_tiny_model()
    model.model.layers[0].mlp.requires_grad_(False)
    accumulated: list[Tensor] = []
    for weight in model.parameters():
        if weight.requires_grad:
            weight.register_post_accumulate_grad_hook(accumulated.append)
        weight.grad = torch.ones_like(weight) if weight.dim() == 1 else None
    flags = [weight.requires_grad for weight in model.parameters()]
    grads = [weight.grad for weight in model.parameters()]
    weights = scored_weights(model)
    if failure == "entering":
        weights["packed"] = nn.Parameter(torch.ones(3, dtype=torch.uint8), requires_grad=False)

    def receive(name: str, gradient: Tensor) -> None:
        if failure == "receive" and name == "model.layers.0.mlp.down_proj.weight":
            raise KeyboardInterrupt

    def run() -> None:
        with WeightGradients(model, weights, receive, by_layer=by_layer) as gradients:
            assert hooks_of(model) > 0
            loss = model(input_ids=IDS, labels=IDS).loss
            if failure == "loss":
                raise KeyboardInterrupt
            gradients.backward(loss)

    if failure is None:
        run()
    else:
        with pytest.raises((KeyboardInterrupt, ValueError, RuntimeError)):
            run()
    assert hooks_of(model) == 0
    assert [weight.requires_grad for weight in model.parameters()] == flags
    assert all(weight.grad is grad for weight, grad in zip(model.parameters(), grads, strict=True))
    assert not accumulated
    # What the user had registered still works.
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert len(accumulated) == sum(flags)


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = inputs * 1
        output = self.first(hidden)
        hidden += 1
        return self.second(output).sum()


def test_an_input_changed_in_place_is_refused() -> None:
    model = InPlace()
    with pytest.raises(RuntimeError, match=r"input of the layer of `first.weight` expected to stay"):
        gradients_of(model, lambda: model(torch.ones(2, 3)), by_hooks)


def test_a_followed_weight_of_no_linear_layer_is_refused() -> None:
    model = nn.Embedding(3, 3)
    with (
        pytest.raises(ValueError, match="`weight` is neither"),
        WeightGradients(model, {"weight": model.weight}, print, by_layer=by_hooks),
    ):
        pass


@pytest.mark.parametrize(
    ("by_layer", "loss"),
    [
        (by_hooks, lambda model: model(torch.ones(3)).sum().detach()),
        (by_autograd, lambda model: model(torch.ones(3)).sum().detach()),
        (by_hooks, lambda model: torch.ones((), requires_grad=True) * 2),
    ],
)
def test_a_loss_that_depends_on_nothing_is_refused(by_layer: Any, loss: Any) -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(RuntimeError, match="does not depend on the weights"):
        gradients_of(model, lambda: loss(model), by_layer)
