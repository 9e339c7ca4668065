# SPDX-License-Identifier: Apache-2.0
"""Epoch counters that Lightning 2.6 gets wrong after two kinds of resume, put right."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl


def correct_at_fit_start(trainer: pl.Trainer) -> None:
    """Do not count an epoch as processed before it is completed; for ``on_train_start``.

    With ``max_steps``, Lightning finishes an epoch a second time if it resumes from a checkpoint of the epoch's end.
    The count of processed epochs is then one too high, and ``max_epochs`` would end the fit an epoch early.
    """
    for counter in _epoch_counters(trainer):
        counter.processed = counter.completed


def correct_in_epoch(trainer: pl.Trainer) -> None:
    """Count the epoch after the completed ones as begun and not processed; for when a batch is asked for.

    An epoch that follows a resume from a checkpoint of the last batch of the epoch before is never counted as begun,
    and a checkpoint of it would start it again from its first batch.
    """
    correct_at_fit_start(trainer)
    for counter in _epoch_counters(trainer):
        counter.ready = counter.started = counter.completed + 1


def _epoch_counters(trainer: pl.Trainer) -> tuple[Any, ...]:
    progress = trainer.fit_loop.epoch_progress
    return progress.current, progress.total
