# SPDX-License-Identifier: Apache-2.0
"""The gradient of a safety loss, and that nothing else changes while it is taken."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_safety.enforcement import WeightHolder
from lightning_safety.enforcement.compact import CompactTraining
from lightning_safety.enforcement.safety_gradient import _not_finite, add_safety_gradient, safety_gradient
from lightning_safety.scoring import ObjectiveBatch, SafetyObjective
from tests.callbacks.toys import make_smallest_model, mask_of_everything
from tests.enforcement.objectives import Broken, Elsewhere, TokenRows


def all_rows(objective: TokenRows) -> tuple[SafetyObjective, ObjectiveBatch]:
    return objective, *objective.batches(None, batch_size=3)


def expected(model: nn.Module, objective: TokenRows) -> list[Tensor]:
    """The gradient of the mean loss over all rows, one row at a time."""
    parameters = list(model.parameters())
    losses = [objective.loss(model, batch) for batch in objective.batches(None, batch_size=1)]
    return list(torch.autograd.grad(torch.stack(losses).mean(), parameters))


def test_it_is_the_gradient_of_the_mean_over_all_examples() -> None:
    model = make_smallest_model()
    found = safety_gradient(model, list(model.parameters()), *all_rows(TokenRows()))
    for gradient, reference in zip(found.gradients, expected(model, TokenRows()), strict=True):
        assert gradient is not None
        torch.testing.assert_close(gradient, reference, rtol=1e-5, atol=1e-7)
    losses = [float(TokenRows().loss(model, batch)) for batch in TokenRows().batches(None, batch_size=1)]
    assert found.loss == pytest.approx(sum(losses) / len(losses), rel=1e-6)


def test_a_scale_changes_nothing_but_the_way_back() -> None:
    model = make_smallest_model()
    plain = safety_gradient(model, list(model.parameters()), *all_rows(TokenRows()))
    scaled = safety_gradient(model, list(model.parameters()), *all_rows(TokenRows()), scale=2.0**12)
    assert scaled.loss == plain.loss
    for one, other in zip(plain.gradients, scaled.gradients, strict=True):
        assert torch.equal(one, other)  # a power of two is exact


def test_a_scale_that_makes_gradients_overflow_is_lowered() -> None:
    model = make_smallest_model()
    plain = safety_gradient(model, list(model.parameters()), *all_rows(TokenRows()))
    scaled = safety_gradient(model, list(model.parameters()), *all_rows(TokenRows()), scale=2.0**127)
    for one, other in zip(plain.gradients, scaled.gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_gradients_modes_and_random_numbers_are_left_as_they_were() -> None:
    model = make_smallest_model(attention_dropout=0.5)
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    model(input_ids=torch.tensor([[3, 4, 5]]), labels=torch.tensor([[3, 4, 5]])).loss.backward()
    kept = {name: (weight.grad, weight.grad.clone()) for name, weight in model.named_parameters()}
    random = torch.get_rng_state()
    safety_gradient(model, list(model.parameters()), *all_rows(TokenRows()))
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model.modules()] == modes
    for name, weight in model.named_parameters():
        assert weight.grad is kept[name][0], name
        assert torch.equal(weight.grad, kept[name][1]), name


def test_held_weights_have_no_part_in_it() -> None:
    model = make_smallest_model()
    mask = mask_of_everything(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reference = expected(model, TokenRows())
    with WeightHolder(mask).attach(model, [optimizer]):
        found = safety_gradient(model, list(model.parameters()), *all_rows(TokenRows()))
    for (name, _), gradient, dense in zip(model.named_parameters(), found.gradients, reference, strict=True):
        held = torch.zeros(dense.numel(), dtype=torch.bool)
        held[mask.indices[name].long()] = True
        assert not gradient.flatten()[held].any(), name
        torch.testing.assert_close(gradient.flatten()[~held], dense.flatten()[~held], rtol=1e-5, atol=1e-7)


def test_of_selected_weights_it_is_taken_where_they_train() -> None:
    model = make_smallest_model()
    mask = mask_of_everything(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reference = dict(zip([name for name, _ in model.named_parameters()], expected(model, TokenRows()), strict=True))
    with CompactTraining(mask).attach(model, [optimizer]):
        vectors = [vector for group in optimizer.param_groups for vector in group["params"]]
        found = safety_gradient(model, vectors, *all_rows(TokenRows()))
    for name, gradient in zip(reference, found.gradients, strict=True):
        taken = reference[name].flatten()[mask.indices[name].long()]
        # The vectors are longer than what is selected, by zeros.
        torch.testing.assert_close(gradient[: taken.numel()], taken, rtol=1e-5, atol=1e-7)
        assert not gradient[taken.numel() :].any()


BAD = pytest.mark.parametrize(
    ("objective", "message"),
    [
        (Broken(), r"The safety loss of Broken expected to be finite but is nan\. The step is not taken"),
        (Broken(gradient_only=True), r"safety gradient of `model\.embed_tokens\.weight` is not finite, although"),
        (Elsewhere(), r"`objective` expected to depend on weights that the optimizer trains but its loss reaches none"),
    ],
)


@BAD
def test_bad_gradients_are_refused_and_the_task_keeps_its_own(objective: TokenRows, message: str) -> None:
    model = make_smallest_model()
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    with pytest.raises(RuntimeError, match=message):
        safety_gradient(model, list(model.parameters()), *all_rows(objective))
    assert all(torch.equal(weight.grad, torch.ones_like(weight)) for weight in model.parameters())
    assert model.training


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_the_first_gradient_that_is_not_finite_is_found(bad: float) -> None:
    """Also among finite ones whose squares overflow, and none is found where all are finite."""
    large = torch.full((4,), 3e38)
    assert torch.linalg.vector_norm(large).isinf()
    assert _not_finite([torch.ones(3), large, None, torch.empty(0)]) is None
    assert _not_finite([torch.ones(3), large, None, torch.tensor([1.0, bad]), torch.tensor([bad])]) == 3


def test_what_is_added_in_place_is_what_is_found_beside() -> None:
    model, beside = make_smallest_model(), make_smallest_model()
    found = safety_gradient(beside, list(beside.parameters()), *all_rows(TokenRows()))
    loss = add_safety_gradient(model, list(model.parameters()), *all_rows(TokenRows()), weight=1.0)
    assert loss == found.loss
    for weight, gradient in zip(model.parameters(), found.gradients, strict=True):
        assert torch.equal(weight.grad, gradient)


def test_where_it_cannot_be_added_in_place_nothing_is() -> None:
    model = make_smallest_model()
    weights = list(model.parameters())
    optimizer = torch.optim.SGD(weights, lr=0.1)
    assert add_safety_gradient(model, weights[:5], *all_rows(TokenRows()), weight=1.0) is None
    assert add_safety_gradient(model.half(), weights, *all_rows(TokenRows()), weight=1.0) is None
    model.float()
    with CompactTraining(mask_of_everything(model)).attach(model, [optimizer]):
        vectors = [vector for group in optimizer.param_groups for vector in group["params"]]
        assert add_safety_gradient(model, vectors, *all_rows(TokenRows()), weight=1.0) is None
    assert all(weight.grad is None for weight in weights)


@BAD
def test_bad_gradients_are_refused_in_place_too(objective: TokenRows, message: str) -> None:
    model = make_smallest_model()
    with pytest.raises(RuntimeError, match=message):
        add_safety_gradient(model, list(model.parameters()), *all_rows(objective), weight=2.0)
    assert model.training
    assert all(not weight._backward_hooks for weight in model.parameters())


def test_vectors_of_other_optimizers_keep_their_gradients() -> None:
    """Hooks of the model's parameters fill the vectors of all optimizers, whichever is about to step."""
    model = make_smallest_model()
    weights = list(model.parameters())
    optimizers = [torch.optim.SGD(some, lr=0.1) for some in (weights[:5], weights[5:])]
    with CompactTraining(mask_of_everything(model)).attach(model, optimizers):
        TokenRows().loss(model, all_rows(TokenRows())[1]).backward()
        mine, others = ([vector for group in each.param_groups for vector in group["params"]] for each in optimizers)
        kept = [vector.grad.clone() for vector in others]
        safety_gradient(model, mine, *all_rows(TokenRows()), beside=[*mine, *others], scale=1024.0)
        assert all(torch.equal(vector.grad, gradient) for vector, gradient in zip(others, kept, strict=True))
