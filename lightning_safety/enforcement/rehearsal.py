# SPDX-License-Identifier: Apache-2.0
"""Safety rehearsal: beside its task a model keeps learning, now and then and on a few examples, what safety asks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

from torch import Tensor, nn

from lightning_safety.arguments import check_choice, check_positive
from lightning_safety.enforcement.processes import sum_of_products
from lightning_safety.enforcement.rotation import Rotation
from lightning_safety.enforcement.safety_gradient import safety_gradient
from lightning_safety.scoring.objective import RefusalLikelihood, RefusalMargin, SafetyObjective

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RehearsalMode = Literal["add", "project"]


class Rehearsed(NamedTuple):
    """What one rehearsal did.

    Attributes:
        loss: The safety loss before it, the mean over the examples.
        conflict: With ``mode="project"``, whether the task's gradient pointed against safety, so that it was changed.
            None with ``mode="add"``, which does not ask.
    """

    loss: float
    conflict: bool | None


class Rehearsal:
    r"""Mixes the gradient of a safety loss on a few rotating examples into the gradient of a task.

    With g the task's gradient and r that of the safety loss, over all that an optimizer trains:

    - ``"add"``: :math:`g + \lambda r`, the gradient of the task's loss plus λ times the safety loss;
    - ``"project"``: :math:`g - \frac{\langle g, r\rangle}{\langle r, r\rangle} r` where
      :math:`\langle g, r\rangle < 0`, else g: a step may not raise the safety loss, to first order (A-GEM, arXiv
      1812.00420).

    Held weights take no part: their gradient is zero in both. The gradient r takes the memory of one more gradient
    while it is mixed in.

    Args:
        objectives: Losses that bound from below, each of which gives a batch to every rehearsal. Default: refusals to
            harmful prompts and good answers to borderline ones (`RefusalLikelihood` on the split ``train``), without
            which the model would come to refuse whatever looks harmful.
        mode: How the gradients are mixed.
        weight: λ. With ``"project"`` it must be 1: the length of r cancels out.
        batch_size: Examples of each objective in one rehearsal.
        seed: Of the order in which the examples come round.

    Raises:
        ValueError: An argument is out of range.
        TypeError: An objective is none.

    Example:
        >>> import torch
        >>> from tests.tiny import make_tiny_model, make_tiny_tokenizer
        >>> model = make_tiny_model()
        >>> rehearsal = Rehearsal(weight=0.5).prepare(model, make_tiny_tokenizer())
        >>> parameters = list(model.parameters())
        >>> rehearsal.mix(model, parameters, position=0).loss > 0
        True
    """

    def __init__(
        self,
        objectives: Sequence[SafetyObjective] | None = None,
        *,
        mode: RehearsalMode = "add",
        weight: float = 1.0,
        batch_size: int = 1,
        seed: int = 0,
    ) -> None:
        check_choice(mode, "mode", get_args(RehearsalMode))
        self.objectives = default_objectives() if objectives is None else list(objectives)
        self.mode = mode
        self.weight = _checked_weight(weight, mode)
        self.batch_size = check_positive(batch_size, "batch_size")
        self.seed = seed
        self._rotations: list[Rotation] = []
        _check_objectives(self.objectives, mode)

    def prepare(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> Rehearsal:
        """Read and tokenise the examples.

        Raises:
            ValueError: An objective has no examples, or its source does not have the split.
        """
        self._rotations = []
        for number, objective in enumerate(self.objectives):
            objective.prepare(model, tokenizer)
            batches = objective.batches(tokenizer, batch_size=self.batch_size)
            if not batches:
                raise ValueError(
                    f"`objective` expected to have examples but {type(objective).__name__} has none. Give it some."
                )
            self._rotations.append(Rotation(batches, self.seed + number))
        return self

    def mix(
        self,
        model: nn.Module,
        parameters: Sequence[Tensor],
        position: int,
        *,
        gradient_scale: float = 1.0,
        loss_scale: float = 1.0,
        forward_context: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> Rehearsed:
        """Change the gradients of `parameters`; nothing else changes, and with λ = 0 not even they.

        Args:
            model: A causal language model.
            parameters: What the next step of an optimizer changes.
            position: How many rehearsals there were before; says which examples are taken.
            gradient_scale: What the task's gradients are multiplied by, as by a gradient scaler not yet undone.
            loss_scale: What the safety loss is multiplied by for its way back through a model in half precision.
            forward_context: Makes what the safety loss is computed in, such as autocast.

        Raises:
            RuntimeError: See `safety_gradient`, or `prepare` was not called.
        """
        if not self._rotations:
            raise RuntimeError("The rehearsal expected to have examples but has none yet. Call `prepare` before.")
        batches = [
            (objective, rotation[position])
            for objective, rotation in zip(self.objectives, self._rotations, strict=True)
        ]
        found = safety_gradient(model, parameters, batches, scale=loss_scale, forward_context=forward_context)
        pairs = [(p, r) for p, r in zip(parameters, found.gradients, strict=True) if r is not None]
        if self.mode == "project":
            return Rehearsed(found.loss, _project(pairs))
        _add(pairs, self.weight * gradient_scale)
        return Rehearsed(found.loss, None)


def default_objectives() -> list[SafetyObjective]:
    """Return what is rehearsed unless something else is asked for: when to refuse, and when not to."""
    return [RefusalLikelihood("harmful", split="train"), RefusalLikelihood("borderline", split="train")]


def _add(pairs: Sequence[tuple[Tensor, Tensor]], weight: float) -> None:
    if weight == 0:
        return
    for parameter, gradient in pairs:
        if parameter.grad is None:
            parameter.grad = gradient.mul_(weight)
        else:
            parameter.grad.add_(gradient, alpha=weight)


def _project(pairs: Sequence[tuple[Tensor, Tensor]]) -> bool:
    # A parameter that the task leaves alone has a zero in g, and still takes part in r.
    with_task = [(parameter.grad, gradient) for parameter, gradient in pairs if parameter.grad is not None]
    product = sum_of_products([g for g, _ in with_task], [r for _, r in with_task])
    if product >= 0:
        return False
    squared = sum_of_products([r for _, r in pairs], [r for _, r in pairs])
    _add(pairs, -product / squared)
    return True


def _checked_weight(weight: float, mode: RehearsalMode) -> float:
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
        raise ValueError(f"`weight` expected to be a number of at least 0 but got {weight!r}. Pass for instance 1.0.")
    if mode == "project" and weight != 1:
        raise ValueError(
            f"`weight` expected to be 1 beside `mode='project'` but got {weight!r}: the projection is the same whatever"
            " the length of the safety gradient. Leave it out, or pass `mode='add'`."
        )
    return float(weight)


def _check_objectives(objectives: Sequence[object], mode: RehearsalMode) -> None:
    for objective in objectives:
        if isinstance(objective, RefusalMargin) and mode == "add":
            raise ValueError(
                "`objective` expected to be a loss with a lower bound but got RefusalMargin, which training would drive"
                " down without end. Pass `RefusalLikelihood()`, or `mode='project'`, which takes its direction only."
            )
        if not isinstance(objective, SafetyObjective):
            raise TypeError(
                f"`objective` expected to be a SafetyObjective or a list of them but got {type(objective).__name__}."
                " Pass for instance `RefusalLikelihood()`."
            )
    if not objectives:
        raise ValueError(
            "`objective` expected to be what is rehearsed but is an empty list. Leave it out, or give one."
        )
