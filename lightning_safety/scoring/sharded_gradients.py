# SPDX-License-Identifier: Apache-2.0
"""The mean gradient of an objective for a model that FSDP2 spreads over processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from lightning_safety.processes import gather, rank, world_size
from lightning_safety.progress import track
from lightning_safety.scoring.finite import check_gradients, check_loss, has_finite_norm
from lightning_safety.scoring.layer_gradients import has_no_gradient
from lightning_safety.scoring.lean import LeanScoring
from lightning_safety.scoring.objective import ObjectiveBatch, SafetyObjective
from lightning_safety.scoring.shards import local_part


def mean_of_shards(
    model: nn.Module,
    objective: SafetyObjective,
    batches: Sequence[ObjectiveBatch],
    weights: Mapping[str, nn.Parameter],
    lean: LeanScoring,
    *,
    show_progress: bool,
) -> dict[str, Tensor]:
    """Return this process's parts of the mean gradients of some weights.

    Processes share out the batches. Every process runs the model as often as the others, or these would wait for it:
    one that has no batch left takes another's, and counts it as nothing.

    Args:
        model: Sharded by FSDP2. All of its weights that are asked for must require gradients.
        objective: Its loss must run the model once.
        batches: The same in every process.
        weights: By canonical name.
        lean: Where and in what dtype gradients are added up.
        show_progress: Whether a bar shows.

    Raises:
        ValueError: A weight is frozen.
        RuntimeError: The loss or a gradient is not finite in some process, or the loss does not depend on the weights.
    """
    frozen = [name for name, weight in weights.items() if not weight.requires_grad]
    if frozen:
        raise ValueError(
            f"`model` expected to require gradients of all scored weights where it is sharded but `{frozen[0]}` is"
            " frozen. Unfreeze it, leave it out with `exclude=`, or score the model on one device and pass the mask."
        )
    device = next(model.parameters()).device
    sums = {name: lean.zeros(weight) for name, weight in weights.items()}
    finite: dict[str, Tensor] = {}

    def add(name: str, gradient: Tensor) -> None:
        # FSDP2 gives every process the mean over processes.
        finite[name] = has_finite_norm(sums[name].add_(gradient.to(sums[name].device), alpha=world_size()))

    starts = range(0, len(batches), world_size())
    with _gradients_go_to(add, model, weights):
        for start in track(starts, "Scoring weights", enabled=show_progress):
            own = start + rank()
            number = own if own < len(batches) else start
            loss = objective.loss(model, batches[number].to(device))
            if not loss.requires_grad:
                raise has_no_gradient()
            finite.clear()
            torch.autograd.backward(loss * (batches[number].examples if number == own else 0))
            _check_everywhere(finite, sums, loss, f"batch {number + 1} of {len(batches)}")
    examples = sum(batch.examples for batch in batches)
    return {name: total.div_(examples) for name, total in sums.items()}


def _check_everywhere(finite: Mapping[str, Tensor], sums: Mapping[str, Tensor], loss: Tensor, place: str) -> None:
    """Refuse a loss or a sum that is not finite in any process, in all of them."""
    problem = None
    try:
        check_loss(loss, place)
        check_gradients(finite, sums, loss, place)
    except RuntimeError as error:
        problem = str(error)
    problems = [found for found in gather(problem) if found is not None]
    if problems:
        raise RuntimeError(problems[0])


@contextmanager
def _gradients_go_to(
    receive: Callable[[str, Tensor], object], model: nn.Module, weights: Mapping[str, nn.Parameter]
) -> Iterator[None]:
    """Inside, hand over this process's part of every gradient as soon as it is reduced, and keep none.

    Gradients that were there are put aside and come back.
    """
    names = {id(weight): name for name, weight in weights.items()}
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    aside = [(parameter, parameter.grad) for parameter in parameters]

    def take(parameter: nn.Parameter) -> None:
        if parameter.grad is not None and id(parameter) in names:
            receive(names[id(parameter)], local_part(parameter.grad))
        parameter.grad = None

    with ExitStack() as hooks:
        for parameter in parameters:
            parameter.grad = None
            # FSDP2 calls these once it has reduced the gradient.
            hook = parameter.register_post_accumulate_grad_hook(partial(_call, take, parameter))  # type: ignore[no-untyped-call]
            hooks.callback(hook.remove)
        try:
            yield
        finally:
            for parameter, gradient in aside:
                parameter.grad = gradient


def _call(take: Callable[[nn.Parameter], None], parameter: nn.Parameter, _: Tensor) -> None:
    take(parameter)
