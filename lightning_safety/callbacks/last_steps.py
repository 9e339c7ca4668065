# SPDX-License-Identifier: Apache-2.0
"""A fit that ends with the mean of the weights after its last steps."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities import rank_zero_warn
from torch import nn
from torch.utils.hooks import RemovableHandle

from lightning_safety.enforcement import AveragedWeights, CompactTraining, SparseDelta
from lightning_safety.scoring.shards import is_sharded


class AverageOfLastSteps:
    """Takes the trained weights after each of the last steps of a fit into a mean, and ends with it.

    Args:
        trainer: Has `max_steps`, and the optimizers in which `training` is attached.
        training: What trains the weights.
        steps: How many.
    """

    def __init__(self, trainer: pl.Trainer, training: CompactTraining | SparseDelta, steps: int) -> None:
        self._trainer = trainer
        self._training = training
        self._steps = steps
        self._last_step = trainer.max_steps
        self._average: AveragedWeights | None = None
        # After those of the training itself, so that the weights are those after the step.
        self._handles: list[RemovableHandle] = [
            optimizer.register_step_post_hook(self._add) for optimizer in trainer.optimizers
        ]

    def begin(self, state: dict[str, Any] | None = None) -> None:
        """Begin anew, or go on with a saved state: before the first step that counts."""
        self._average = AveragedWeights(self._training)
        if state is not None:
            self._average.load_state_dict(state)

    def end(self, name: str) -> None:
        """Settle for the mean of fewer steps where the fit ended earlier than planned, and say so by a name."""
        if self._average is None or self._trainer.global_step >= self._last_step:
            return
        self._average.settle()
        rank_zero_warn(
            f"{name}: the fit ended after {self._trainer.global_step} of {self._last_step} steps, so"
            f" {self._average.steps} are averaged instead of the last {self._steps}."
        )

    def state_dict(self) -> dict[str, Any] | None:
        """Return what `begin` goes on with; None before it."""
        return None if self._average is None else self._average.state_dict()

    def remove(self) -> None:
        """Take no more steps into the mean."""
        for handle in self._handles:
            handle.remove()

    def _add(self, *_: Any) -> None:
        """Take a step into the mean: inside of the step, so that whoever looks after the last one sees the mean."""
        if self._average is None:
            return
        step = self._trainer.global_step + 1
        if step > self._last_step - self._steps:
            self._average.add()
        if step == self._last_step:
            self._average.settle()


def check_average_last(steps: int | None, trainer: pl.Trainer, model: nn.Module) -> None:
    """Refuse an average of so many last steps where none can be made.

    Raises:
        ValueError: The trainer does not say which steps are the last, or the model is sharded.
    """
    if steps is not None and trainer.max_steps < 1:
        raise ValueError(
            f"`average_last={steps}` expected a trainer with `max_steps`, which says when the last steps begin, but it"
            f" is {trainer.max_steps}. Set it."
        )
    if steps is not None and is_sharded(model.parameters()):
        raise ValueError(
            f"`average_last={steps}` expected a strategy that leaves the model whole but"
            f" {type(trainer.strategy).__name__} shards it. Use DDP or one device, or leave it out."
        )
