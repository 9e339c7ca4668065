# SPDX-License-Identifier: Apache-2.0
"""The gradient of a safety loss beside that of a task, which is left as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_safety.enforcement.gradients import check_dense, dense_gradient
from lightning_safety.enforcement.processes import average_over_processes, failed_anywhere
from lightning_safety.language import canonical_name
from lightning_safety.language.modes import differentiated_beside_training
from lightning_safety.processes import world_size
from lightning_safety.randomness import preserved_random_state
from lightning_safety.scoring.finite import has_finite_norm, is_finite
from lightning_safety.scoring.objective import ObjectiveBatch, SafetyObjective
from lightning_safety.scoring.shards import is_sharded, local_part

# By how much a loss is scaled down where its gradient overflows; a gradient scaler halves its scale, step by step.
_BACK_OFF = 2.0**8
# What is no parameter of the model trains in the place of some.
_VECTOR = "the selected weights"


class SafetyGradient(NamedTuple):
    """What `safety_gradient` returns.

    Attributes:
        loss: The safety loss, the mean over the examples of the batch.
        gradients: For each parameter its gradient, None where the loss does not reach it.
    """

    loss: float
    gradients: list[Tensor | None]


def safety_gradient(
    model: nn.Module,
    parameters: Sequence[Tensor],
    objective: SafetyObjective,
    batch: ObjectiveBatch,
    *,
    beside: Sequence[Tensor] = (),
    scale: float = 1.0,
    forward_context: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> SafetyGradient:
    """Return the gradient of the safety loss with respect to `parameters`.

    It takes the way through the model that a task's gradient takes: hooks on the parameters act on it, so that the
    gradient of a held weight is zero and that of a selected one ends in the vector that trains it. Everything else is
    left as it was: the gradients that are there, modes, and random number generators. The model is in evaluation mode.
    Between processes, each of which takes the same batch, the result is averaged.

    Args:
        model: A causal language model.
        parameters: What the gradient is wanted for; need not be parameters of the model itself.
        objective: Minus its score is the safety loss.
        batch: What to take it on.
        beside: What else hooks of the model's parameters may give gradients to: the vectors of other optimizers.
        scale: What the loss is multiplied by for its way back, so that half-precision gradients do not underflow. The
            result is divided by it. Where it makes them overflow, a smaller one is tried.
        forward_context: Makes what a loss is computed in, such as autocast.

    Raises:
        RuntimeError: The loss or a gradient is not finite, the loss reaches none of the parameters, or a gradient is
            sparse.
    """
    while True:
        found = _attempt(model, parameters, objective, batch, beside, scale, forward_context)
        bad = _not_finite(found.gradients)
        if bad is None:
            break
        if scale <= 1:
            raise _not_finite_in(_name(model, parameters[bad]), found.loss)
        scale = max(1.0, scale / _BACK_OFF)
    if all(gradient is None for gradient in found.gradients):
        raise _reaches_none()
    return found


def add_safety_gradient(
    model: nn.Module,
    parameters: Sequence[Tensor],
    objective: SafetyObjective,
    batch: ObjectiveBatch,
    *,
    weight: float,
    forward_context: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> float | None:
    """Add `weight` times the gradient of the safety loss to the gradients that are there, and hold no second one.

    What `safety_gradient` finds is the same but for rounding. Where it raises for a gradient, those of the task have
    been changed.

    Args:
        model: As there.
        parameters: As there.
        objective: As there.
        batch: As there.
        weight: Above 0.
        forward_context: As there.

    Returns:
        The safety loss; None where this cannot be done and nothing was: the model is sharded, there are several
        processes, `parameters` are not just what the model trains (vectors in the place of weights, parts of other
        optimizers), or it trains in float16, where the weighted gradient could overflow.

    Raises:
        RuntimeError: As there.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    wanted = {id(parameter) for parameter in parameters if parameter.requires_grad}
    if world_size() > 1 or wanted != {id(parameter) for parameter in trained.values()}:
        return None
    # FSDP2 gives sharded weights their gradients itself, in one process too, where hooks of theirs do not see them.
    if is_sharded(trained.values()):
        return None
    if any(parameter.dtype == torch.float16 for parameter in trained.values()):
        return None
    norms: dict[str, Tensor] = {}
    with _rehearsing_state(model), ExitStack() as hooks:
        loss = _checked_loss(model, objective, batch, forward_context)
        for name, parameter in trained.items():
            register: Callable[..., RemovableHandle] = parameter.register_hook
            hooks.callback(register(partial(_note_norm, norms, name)).remove)
        if loss.requires_grad:
            torch.autograd.backward(loss * weight)
    value = float(loss.detach())
    if not norms:
        raise _reaches_none()
    if not bool(torch.stack(list(norms.values())).isfinite().all()):
        for name, parameter in trained.items():
            # What is not finite stays so in the sum; of what only has large entries the norm has overflowed.
            summed = parameter.grad
            if name in norms and not norms[name].isfinite() and summed is not None and not is_finite(summed):
                raise _not_finite_in(f"`{canonical_name(name)}`", value)
    return value


def _note_norm(norms: dict[str, Tensor], name: str, gradient: Tensor) -> None:
    check_dense(name, gradient)
    # Whether they are finite is asked of all at once: of hundreds of small gradients that is a part of the time.
    norms[name] = torch.linalg.vector_norm(gradient).float()


def _checked_loss(
    model: nn.Module,
    objective: SafetyObjective,
    batch: ObjectiveBatch,
    forward_context: Callable[[], AbstractContextManager[object]],
) -> Tensor:
    with forward_context():
        loss = objective.loss(model, batch.to(next(model.parameters()).device))
    if failed_anywhere([loss.detach().isfinite()])[0]:
        raise RuntimeError(
            f"The safety loss of {type(objective).__name__} expected to be finite but is {float(loss.detach()):g}. The"
            " step is not taken. Check the model's weights, and train in float32 or bfloat16."
        )
    return loss


def _not_finite_in(name: str, loss: float) -> RuntimeError:
    return RuntimeError(
        f"The safety gradient of {name} is not finite, although the loss is {loss:g}. The step is not taken. Train in"
        " float32 or bfloat16, or rehearse other examples."
    )


def _reaches_none() -> RuntimeError:
    return RuntimeError(
        "`objective` expected to depend on weights that the optimizer trains but its loss reaches none of them."
        " Unfreeze weights of the language model, name it by `language_model=`, or leave the rehearsal out."
    )


def _attempt(
    model: nn.Module,
    parameters: Sequence[Tensor],
    objective: SafetyObjective,
    batch: ObjectiveBatch,
    beside: Sequence[Tensor],
    scale: float,
    forward_context: Callable[[], AbstractContextManager[object]],
) -> SafetyGradient:
    with _rehearsing_state(model), _gradients_put_aside([*model.parameters(), *parameters, *beside]):
        loss = _checked_loss(model, objective, batch, forward_context)
        if loss.requires_grad:
            torch.autograd.backward(loss * scale)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        gradients = [dense_gradient(names.get(id(parameter), _VECTOR), parameter) for parameter in parameters]
    for gradient in gradients:
        if gradient is not None and scale != 1:
            gradient.div_(scale)
    average_over_processes([gradient for gradient in gradients if gradient is not None])
    return SafetyGradient(float(loss.detach()), gradients)


@contextmanager
def _rehearsing_state(model: nn.Module) -> Iterator[None]:
    with preserved_random_state(), differentiated_beside_training(model):
        yield


@contextmanager
def _gradients_put_aside(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Take away all gradients, and put them back afterwards: the same tensors, whatever views of them there are."""
    aside = {id(parameter): (parameter, parameter.grad) for parameter in parameters}
    try:
        for parameter, _ in aside.values():
            parameter.grad = None
        yield
    finally:
        for parameter, gradient in aside.values():
            parameter.grad = gradient


def _not_finite(gradients: Sequence[Tensor | None]) -> int | None:
    """Return the place of the first gradient that is not finite in any process."""
    local = {place: local_part(gradient) for place, gradient in enumerate(gradients) if gradient is not None}
    suspects = _failing(local, has_finite_norm)
    if not suspects:
        return None
    # Every process suspects the same.
    failing = _failing({place: local[place] for place in suspects}, is_finite)
    return failing[0] if failing else None


def _failing(gradients: Mapping[int, Tensor], passes: Callable[[Tensor], Tensor]) -> list[int]:
    """Return the places of those that do not pass in every process; one question for all of them."""
    failed = failed_anywhere([passes(gradient) for gradient in gradients.values()])
    return [place for place, wrong in zip(gradients, failed, strict=True) if wrong]


def _name(model: nn.Module, parameter: Tensor) -> str:
    names = (canonical_name(name) for name, other in model.named_parameters() if other is parameter)
    return next((f"`{name}`" for name in names), _VECTOR)
