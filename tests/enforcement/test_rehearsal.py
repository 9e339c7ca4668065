# SPDX-License-Identifier: Apache-2.0
"""Mixing a safety gradient into a task's: by the formula, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_safety.data import Example
from lightning_safety.enforcement.rehearsal import Rehearsal
from lightning_safety.scoring import RefusalLikelihood, RefusalMargin
from tests.callbacks.toys import make_smallest_model
from tests.enforcement.objectives import TokenRows
from tests.enforcement.test_safety_gradient import expected
from tests.tiny import make_tiny_tokenizer


def flat(tensors: Any) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def gradients(model: Any) -> Tensor:
    return flat(weight.grad for weight in model.parameters())


def give_task(model: Any, sign: float, safety: Tensor, *, noise: float = 1.0) -> Tensor:
    """Set gradients that point for safety (-) or against it, beside noise."""
    generator = torch.Generator().manual_seed(0)
    task = noise * torch.randn(safety.shape, generator=generator) * safety.norm() / safety.numel() ** 0.5
    task = task - (task @ safety) / (safety @ safety) * safety + sign * safety
    torch.nn.utils.vector_to_parameters(task, [weight.grad for weight in model.parameters()])
    return task.clone()  # the gradients are views of it


def ready(model: Any, **options: Any) -> tuple[Rehearsal, Tensor]:
    """A rehearsal of all rows at once, and its gradient."""
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    safety = flat(expected(model, TokenRows()))
    return Rehearsal(TokenRows(), batch_size=3, **options).prepare(model, None), safety  # type: ignore[arg-type]


@pytest.mark.parametrize("loss_scale", [1.0, 64.0])
@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_add_is_the_sum(scale: float, loss_scale: float) -> None:
    model = make_smallest_model()
    rehearsal, safety = ready(model, weight=0.25)
    task = give_task(model, 0.5, safety)
    kept = [weight.grad for weight in model.parameters()]
    done = rehearsal.mix(model, list(model.parameters()), 0, gradient_scale=scale, loss_scale=loss_scale)
    torch.testing.assert_close(gradients(model), task + 0.25 * scale * safety)
    assert all(weight.grad is gradient for weight, gradient in zip(model.parameters(), kept, strict=True))
    assert done.conflict is None


def test_weight_zero_changes_no_bit() -> None:
    model = make_smallest_model()
    rehearsal, safety = ready(model, weight=0)
    task = give_task(model, 0.5, safety)
    task[0] = -0.0
    model.model.embed_tokens.weight.grad.view(-1)[0] = -0.0
    rehearsal.mix(model, list(model.parameters()), 0)
    assert torch.equal(gradients(model).view(torch.int32), task.view(torch.int32))


def test_project_takes_out_what_points_against_safety() -> None:
    model = make_smallest_model()
    rehearsal, safety = ready(model, mode="project")
    task = give_task(model, -0.5, safety)
    done = rehearsal.mix(model, list(model.parameters()), 0)
    reference = task - (task @ safety) / (safety @ safety) * safety
    torch.testing.assert_close(gradients(model), reference, rtol=1e-5, atol=1e-6)
    assert abs(float(gradients(model) @ safety)) < 1e-5 * float(task.norm() * safety.norm())
    assert done.conflict is True


def test_project_leaves_a_task_alone_that_does_not_point_against_safety() -> None:
    model = make_smallest_model()
    rehearsal, safety = ready(model, mode="project")
    task = give_task(model, 0.5, safety)
    assert rehearsal.mix(model, list(model.parameters()), 0).conflict is False
    assert torch.equal(gradients(model), task)


@pytest.mark.parametrize("mode", ["add", "project"])
def test_a_parameter_that_the_task_leaves_alone_has_a_zero_in_it(mode: Any) -> None:
    model, other = make_smallest_model(), make_smallest_model()
    for each, missing in ((model, True), (other, False)):
        rehearsal, safety = ready(each, mode=mode)
        give_task(each, -0.5, safety)
        for weight in list(each.parameters())[1:4]:
            weight.grad = None if missing else torch.zeros_like(weight)
        rehearsal.mix(each, list(each.parameters()), 0)
    torch.testing.assert_close(gradients(model), gradients(other))


def test_the_examples_come_round() -> None:
    model, objective = make_smallest_model(), TokenRows()
    rehearsal = Rehearsal(objective, batch_size=1).prepare(model, None)  # type: ignore[arg-type]
    for position in range(6):
        rehearsal.mix(model, list(model.parameters()), position)
    assert sorted(objective.seen) == sorted(objective.rows * 2)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mode": "ad"}, ValueError, r"`mode` expected to be one of 'add', 'project' but got 'ad'"),
        ({"weight": -1}, ValueError, r"`weight` expected to be a number of at least 0 but got -1"),
        ({"weight": float("nan")}, ValueError, r"`weight` expected to be a number of at least 0 but got nan"),
        ({"weight": True}, ValueError, r"`weight` expected to be a number of at least 0 but got True"),
        ({"mode": "project", "weight": 2}, ValueError, r"`weight` expected to be 1 beside `mode='project'` but got 2"),
        ({"batch_size": 0}, ValueError, r"`batch_size` expected to be"),
        ({"objective": "harmful"}, TypeError, r"`objective` expected to be a SafetyObjective but got str"),
        ({"objective": RefusalMargin()}, ValueError, r"a lower bound but got RefusalMargin"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Rehearsal(**{"objective": TokenRows(), **options})


def test_the_default_weight_is_for_adding() -> None:
    assert Rehearsal(TokenRows()).weight == 3
    assert Rehearsal(TokenRows(), mode="project").weight == 1


def test_a_margin_may_say_where_to_project() -> None:
    assert Rehearsal(RefusalMargin(), mode="project").mode == "project"


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (RefusalLikelihood([]), r"`examples` expected to hold at least one example but is empty"),
        (RefusalLikelihood([Example("Hello.")]), r"`examples` expected to have a response in every row"),
        (RefusalLikelihood("borderline", split="score"), r"score"),
    ],
)
def test_an_objective_without_examples_is_refused(objective: RefusalLikelihood, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rehearsal(objective).prepare(make_smallest_model(), make_tiny_tokenizer())


def test_examples_come_first() -> None:
    model = make_smallest_model()
    with pytest.raises(RuntimeError, match=r"expected to have examples but has none yet\. Call `prepare` before"):
        Rehearsal(TokenRows()).mix(model, list(model.parameters()), 0)
