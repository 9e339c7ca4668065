# SPDX-License-Identifier: Apache-2.0
"""How many checks of a monitor a fit will have."""

from __future__ import annotations

import math

import pytorch_lightning as pl

from lightning_safety.callbacks.monitor import SafetyMonitor


def count_planned_checks(trainer: pl.Trainer, monitor: SafetyMonitor) -> int | None:
    """Return how many checks of `monitor` are to come; once the training data are set up, as in ``on_train_start``.

    A fit that ends earlier has no more. Where optimizers are stepped by hand, each counts once a batch.

    Returns:
        None where that cannot be known: the fit has no end by steps or epochs, or its epochs have no length.
    """
    an_epoch, end = _steps_of_epoch(trainer), last_step(trainer)
    if math.isinf(end):
        return None
    due: set[int] = set()
    if monitor.every_n_steps is not None:
        due.update(range(monitor.every_n_steps, int(end) + 1, monitor.every_n_steps))
    if monitor.every_n_epochs is not None:
        if math.isinf(an_epoch):
            return None
        epochs = range(monitor.every_n_epochs, math.ceil(end / an_epoch) + 1, monitor.every_n_epochs)
        due.update(int(min(epoch * an_epoch, end)) for epoch in epochs)
    if monitor.at_end:
        due.add(int(end))
    return sum(step > trainer.global_step for step in due)


def _steps_of_epoch(trainer: pl.Trainer) -> float:
    """Return the optimizer steps of an epoch; infinity if its length is not known."""
    batches = float(trainer.num_training_batches)
    if math.isinf(batches):
        return batches
    by_hand = not trainer.lightning_module.automatic_optimization
    return math.ceil(batches / trainer.accumulate_grad_batches) * (len(trainer.optimizers) if by_hand else 1)


def last_step(trainer: pl.Trainer) -> float:
    """Return the step that the fit ends at, unless it is stopped; infinity if that is not known."""
    # `estimated_stepping_batches` takes epochs of unknown length for -1 steps.
    epochs = trainer.max_epochs
    by_epochs = math.inf if epochs is None or epochs < 0 else epochs * _steps_of_epoch(trainer)
    return min(by_epochs, math.inf if trainer.max_steps < 0 else trainer.max_steps)
