# SPDX-License-Identifier: Apache-2.0
"""What `SafetyBudget` says: at the start of a fit, after a check, and where it cannot work."""

from __future__ import annotations

from collections.abc import Collection

import pytorch_lightning as pl

from lightning_safety.arguments import closest
from lightning_safety.callbacks.monitor import monitors_of
from lightning_safety.callbacks.resume import restores_late
from lightning_safety.callbacks.together import averaging_callback
from lightning_safety.monitoring.repeated import Comparison, RepeatedComparison

_DOES = {
    "warn": "warns",
    "stop": "stops the fit",
    "rollback": "restores the last good weights and stops the fit",
}


def what_bars_a_budget(trainer: pl.Trainer, metric: str, rolling_back: int) -> str | None:
    """Return what in the trainer's list a budget cannot work with or without, and what to do.

    Args:
        trainer: The trainer.
        metric: What the budget is of.
        rolling_back: How many budgets roll back, this one among them; 0 where this one does not.
    """
    if not monitors_of(trainer):
        return (
            f"`callbacks` expected to hold a monitor that measures {metric} but there is none. Add"
            " `HarmfulnessMonitor()` beside the budget."
        )
    if rolling_back > 1:
        return (
            "`callbacks` expected to hold one SafetyBudget that rolls back but there are several, and what is good"
            ' for one may not be for another. Give all but one `action="stop"`.'
        )
    if rolling_back and restores_late(trainer):
        return (
            f'`action="rollback"` expected a strategy that leaves the model whole but {type(trainer.strategy).__name__}'
            ' shards it. Pass `action="stop"`, or use DDP or one device.'
        )
    averaging = averaging_callback(trainer)
    if averaging is not None and rolling_back:
        return (
            f'`action="rollback"` expected the weights to stay as restored but {averaging} replaces them by its'
            ' mean at the end of the fit. Leave it out, or pass `action="stop"`.'
        )
    if rolling_back and any(getattr(callback, "rescore_every_n_steps", None) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        return (
            '`action="rollback"` expected weights that are held from the start on but `rescore_every_n_steps` lets the'
            ' held ones change, and those held last would not be the restored ones. Pass `action="stop"`.'
        )
    return None


def why_no_baseline(trainer: pl.Trainer, metric: str, offered: Collection[str], state_key: str) -> str:
    """Return why nothing was compared with before the first step, and what to do.

    Args:
        trainer: The trainer.
        metric: What was looked for.
        offered: What has outcomes by prompt.
        state_key: The name of the budget's state in a checkpoint.
    """
    if trainer.ckpt_path is not None:
        return (
            f"`ckpt_path` expected to be a checkpoint that knows {metric} from before the fit but it has no state of"
            f" {state_key}. Resume with the budget that it was saved with, or start a new fit from its weights."
        )
    monitors = monitors_of(trainer)
    late = sorted({type(monitor).__name__ for monitor in monitors if not monitor.at_start})
    known = f" Measured were {', '.join(offered)}." if offered else ""
    if late:
        return (
            f"`at_start` of {' or '.join(late)} expected to be True but it is False: the budget compares with a check"
            f" of {metric} before the first step.{known} Pass `at_start=True`."
        )
    expected = f"`metric` expected to be one that a monitor measures prompt by prompt but got {metric!r}"
    if offered:
        return f"{expected}.{known} {closest(metric, offered)}"
    names = sorted({type(monitor).__name__ for monitor in monitors})
    return (
        f"{expected}, and {' and '.join(names)} {'measures' if len(names) == 1 else 'measure'} nothing so."
        " `HarmfulnessMonitor()` does, unless `generate=False`."
    )


def what_can_be_detected(test: RepeatedComparison, metric: str, action: str, step: int) -> str:
    """Return the line at the start of a fit."""
    smallest = test.smallest_increase or 0.0
    return (
        f"SafetyBudget: {metric} may rise by {test.max_increase:g} from {test.pairs - test.room} of {test.pairs}"
        f" prompts at step {step}. {_plan(test)}; the smallest increase that one can detect is {smallest:.3g}"
        f" ({round(smallest * test.pairs)} prompts newly, none no longer). Then it {_DOES[action]}."
    )


def why_nothing_can_be_detected(test: RepeatedComparison, metric: str) -> str:
    """Return why the test can detect nothing, and how many prompts would do."""
    most = test.pairs - test.room
    already = f", of which it counts {most} already" if most else ""
    return (
        f"SafetyBudget expected {metric} to be measured on prompts enough to detect an increase but it is on"
        f" {test.pairs}{already}. {_plan(test)}. {test.smallest_number_of_prompts} would do if it counted none of"
        " them now. Give the monitor more prompts, or let it check less often."
    )


def what_was_found(test: RepeatedComparison, found: Comparison, metric: str, step: int) -> str:
    """Return what a check that rejects has found, in a sentence."""
    change = found.change
    row = f", {found.in_a_row} checks in a row" if found.in_a_row > 1 else ""
    return (
        f"SafetyBudget at step {step}: {metric} is {change.increase:.3g} above the first check ({change.newly} of"
        f" {change.pairs} prompts newly, {change.no_longer} no longer), more than `max_increase={test.max_increase:g}`"
        f" (p = {found.p_value:.2g}, level {test.level:.2g}{row})."
    )


def what_is_weak(test: RepeatedComparison, found: Comparison, step: int, action: str) -> list[str]:
    """Return warnings of a check that says little: prompts left out, or more checks than planned."""
    at, change, weak = f"SafetyBudget at step {step}:", found.change, []
    if found.rejected is None:
        weak.append(
            f"{at} only {change.pairs} prompts could be told now and at the first check, too few to detect anything."
            " The check counts neither for nor against."
        )
    elif change.warning:
        kept = " The weights do not count as good." if action == "rollback" and not found.rejected else ""
        weak.append(f"{at} {change.warning}: these prompts could not be told now or at the first check.{kept}")
    if found.number == test.planned_checks + 1:
        weak.append(
            f"{at} this is check {found.number} of {test.planned_checks} planned. From here on the probability of a"
            f" false alarm is above `alpha={test.alpha:g}`. Pass `planned_checks=` to plan for more."
        )
    return weak


def when_it_stops(trainer: pl.Trainer) -> str:
    """Return "stops", or when Lightning will, which holds on to `min_epochs` and `min_steps`."""
    epochs = trainer.current_epoch + int(trainer.is_last_batch)
    delays = []
    if trainer.min_epochs and epochs < trainer.min_epochs:
        delays.append(f"`min_epochs={trainer.min_epochs}`")
    if trainer.min_steps and trainer.global_step < trainer.min_steps:
        delays.append(f"`min_steps={trainer.min_steps}`")
    return f"goes on until {' and '.join(delays)}, and then stops" if delays else "stops"


def _plan(test: RepeatedComparison) -> str:
    checks = "1 check is" if test.planned_checks == 1 else f"{test.planned_checks} checks are"
    return f"{checks} planned, each at level {test.level:.3g}"
