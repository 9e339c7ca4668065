# SPDX-License-Identifier: Apache-2.0
"""The mean gradient of an objective for a model that FSDP2 spreads over processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from lightning_safety.processes import gather, rank, world_size
from lightning_safety.progress import track
from lightning_safety.scoring.finite import is_finite
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
    sums = {name: _zeros(weight, lean) for name, weight in weights.items()}
    reached: set[str] = set()

    def add(name: str, gradient: Tensor) -> None:
        reached.add(name)
        # FSDP2 gives every process the mean over processes.
        sums[name].add_(gradient.to(sums[name].device), alpha=world_size())

    starts = range(0, len(batches), world_size())
    with _gradients_go_to(add, model, weights):
        for start in track(starts, "Scoring weights", enabled=show_progress):
            own = start + rank()
            batch, counted = (batches[own], batches[own].examples) if own < len(batches) else (batches[start], 0)
            loss = objective.loss(model, batch.to(device))
            if not loss.requires_grad:
                raise RuntimeError(
                    "The loss of `objective` does not depend on the weights to score: it has no gradient. Compute it"
                    " from the model's output, without `torch.no_grad()` or `.detach()`."
                )
            torch.autograd.backward(loss * counted)
            _check(loss, sums, reached, own)
            reached.clear()
    examples = sum(batch.examples for batch in batches)
    return {name: total.div_(examples) for name, total in sums.items()}


def _zeros(weight: nn.Parameter, lean: LeanScoring) -> Tensor:
    local = local_part(weight)
    device = "cpu" if lean.accumulate_on == "cpu" else local.device
    return torch.zeros(local.shape, dtype=lean.dtype, device=device)


def _check(loss: Tensor, sums: Mapping[str, Tensor], reached: set[str], number: int) -> None:
    """Refuse a loss or a sum that is not finite in any process, in all of them."""
    value, problem = float(loss.detach()), None
    if not math.isfinite(value):
        problem = (
            f"The loss of `objective` is {value:g} in batch {number + 1}. Check the model's weights and its dtype:"
            " float16 often overflows, bfloat16 and float32 do not."
        )
    else:
        bad = next((name for name in sums if name in reached and not is_finite(sums[name])), None)
        if bad is not None:
            problem = f"The gradient of `{bad}` is not finite, although the loss is {value:g}. Score in float32."
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
