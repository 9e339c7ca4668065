# SPDX-License-Identifier: Apache-2.0
"""Safety rehearsal: beside its task a model keeps learning, now and then and on a few examples, what safety asks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self, get_args

from torch import Tensor, nn

from lightning_safety.arguments import check_choice, check_positive
from lightning_safety.enforcement.processes import sum_of_products
from lightning_safety.enforcement.rotation import Rotation
from lightning_safety.enforcement.safety_gradient import add_safety_gradient, safety_gradient
from lightning_safety.scoring.objective import SafetyObjective

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RehearsalMode = Literal["add", "project"]
# Of a loss per token, so that a few short replies count beside a batch of long ones.
_WEIGHT = 3.0


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

    Held weights take no part: their gradient is zero in both. On a single device r is added as it comes, where the
    optimizer trains just what the model trains, none of it in float16, and no gradient scaler is at work; else, and
    with ``"project"``, it takes the memory of one more gradient while it is mixed in.

    Args:
        objective: A loss with a lower bound. It should hold what to refuse and what not to: rehearsing refusals alone,
            a model comes to refuse whatever looks harmful.
        mode: How the gradients are mixed.
        weight: λ; None: 3. With ``"project"`` leave it out: the length of r cancels out.
        batch_size: Examples in one rehearsal.
        seed: Of the order in which the examples come round.

    Raises:
        ValueError: An argument is out of range.
        TypeError: `objective` is none.

    Example:
        >>> from lightning_safety.scoring import RefusalLikelihood
        >>> from tests.tiny import make_tiny_model, make_tiny_tokenizer
        >>> model = make_tiny_model()
        >>> rehearsal = Rehearsal(RefusalLikelihood(limit=4), weight=0.5).prepare(model, make_tiny_tokenizer())
        >>> parameters = list(model.parameters())
        >>> rehearsal.mix(model, parameters, position=0).loss > 0
        True
    """

    def __init__(
        self,
        objective: SafetyObjective,
        *,
        mode: RehearsalMode = "add",
        weight: float | None = None,
        batch_size: int = 2,
        seed: int = 0,
    ) -> None:
        check_choice(mode, "mode", get_args(RehearsalMode))
        self.objective = objective
        self.mode = mode
        self.weight = _checked_weight(weight, mode)
        self.batch_size = check_positive(batch_size, "batch_size")
        self.seed = seed
        self._rotation: Rotation | None = None
        _check_objective(objective, mode)

    def prepare(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, restored: dict[str, Any] | None = None
    ) -> Self:
        """Read and tokenise the examples.

        Args:
            model: The model as it is before the fit.
            tokenizer: Its tokenizer.
            restored: Of a fit that is resumed, the `state_dict` of its objective: the model is trained by now.

        Raises:
            ValueError: The objective has no examples, or its source does not have the split.
        """
        if restored:
            self.objective.load_state_dict(restored)
        else:
            self.objective.prepare_together(model, tokenizer)
        batches = self.objective.batches(tokenizer, batch_size=self.batch_size)
        if not batches:
            raise ValueError(
                f"`objective` expected to have examples but {type(self.objective).__name__} has none. Give it some."
            )
        self._rotation = Rotation(batches, self.seed)
        return self

    def mix(
        self,
        model: nn.Module,
        parameters: Sequence[Tensor],
        position: int,
        *,
        beside: Sequence[Tensor] = (),
        gradient_scale: float = 1.0,
        loss_scale: float = 1.0,
        forward_context: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> Rehearsed:
        """Change the gradients of `parameters`; nothing else changes, and with λ = 0 not even they.

        Args:
            model: A causal language model.
            parameters: What the next step of an optimizer changes.
            position: How many rehearsals there were before; says which examples are taken.
            beside: What other optimizers change; its gradients are left as they are.
            gradient_scale: What the task's gradients are multiplied by, as by a gradient scaler not yet undone.
            loss_scale: What the safety loss is multiplied by for its way back through a model in half precision.
            forward_context: Makes what the safety loss is computed in, such as autocast.

        Raises:
            RuntimeError: See `safety_gradient`, or `prepare` was not called.
        """
        if self._rotation is None:
            raise RuntimeError("The rehearsal expected to have examples but has none yet. Call `prepare` before.")
        batch = self._rotation[position]
        factor = self.weight * gradient_scale
        if self.mode == "add" and factor > 0 and loss_scale == 1:
            loss = add_safety_gradient(
                model, parameters, self.objective, batch, weight=factor, forward_context=forward_context
            )
            if loss is not None:
                return Rehearsed(loss, None)
        found = safety_gradient(
            model,
            parameters,
            self.objective,
            batch,
            beside=beside,
            scale=loss_scale,
            forward_context=forward_context,
        )
        pairs = [(p, r) for p, r in zip(parameters, found.gradients, strict=True) if r is not None]
        if self.mode == "project":
            return Rehearsed(found.loss, _project(pairs))
        _add(pairs, factor)
        return Rehearsed(found.loss, None)


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
    # Not so either where the task's gradient is not finite: a gradient scaler drops that step.
    if not product < 0:
        return False
    squared = sum_of_products([r for _, r in pairs], [r for _, r in pairs])
    if not squared > 0:
        return False
    _add(pairs, -product / squared)
    return True


def _checked_weight(weight: float | None, mode: RehearsalMode) -> float:
    if weight is None:
        return _WEIGHT if mode == "add" else 1.0
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
        raise ValueError(f"`weight` expected to be a number of at least 0 but got {weight!r}. Pass for instance 1.0.")
    if mode == "project" and weight != 1:
        raise ValueError(
            f"`weight` expected to be 1 beside `mode='project'` but got {weight!r}: the projection is the same whatever"
            " the length of the safety gradient. Leave it out, or pass `mode='add'`."
        )
    return float(weight)


def _check_objective(objective: object, mode: RehearsalMode) -> None:
    if not isinstance(objective, SafetyObjective):
        raise TypeError(
            f"`objective` expected to be a SafetyObjective but got {type(objective).__name__}. Pass for instance"
            " `RefusalLikelihood(split='train')`."
        )
    if not objective.bounded and mode == "add":
        raise ValueError(
            f"`objective` expected to be a loss with a lower bound but got {type(objective).__name__}, which training"
            " would drive down without end. Pass one of likelihoods, such as `OwnReplies()`, or `mode='project'`, which"
            " takes its direction only."
        )
