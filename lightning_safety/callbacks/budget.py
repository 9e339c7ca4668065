# SPDX-License-Identifier: Apache-2.0
"""A limit to what a fit may cost in safety: beyond it, a warning, an end, or the last good weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import pytorch_lightning as pl
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn

from lightning_safety.arguments import check_choice, check_positive
from lightning_safety.callbacks.budget_texts import (
    what_bars_a_budget,
    what_can_be_detected,
    what_is_weak,
    what_was_found,
    when_it_stops,
    why_no_baseline,
    why_nothing_can_be_detected,
)
from lightning_safety.callbacks.enhancement import SafetyEnhancementTuning
from lightning_safety.callbacks.last_good import LastGoodWeights
from lightning_safety.callbacks.log import leaves_files
from lightning_safety.callbacks.monitor import Check, SafetyListener, SafetyMonitor, monitors_of
from lightning_safety.callbacks.planned_checks import count_planned_checks
from lightning_safety.callbacks.strategies import REPLICATED, SHARDED, check_strategy
from lightning_safety.monitoring.paired import check_alpha, check_margin
from lightning_safety.monitoring.repeated import RepeatedComparison

BudgetAction = Literal["warn", "stop", "rollback"]

_STATE_VERSION = 1


class SafetyBudget(pl.Callback, SafetyListener):
    """Acts when a safety metric has risen by more than a fit is allowed to cost.

    Beside a monitor, wherever in the trainer's list: each of the monitor's checks is compared with the one before the
    first step, prompt by prompt, by an exact one-sided test of whether the metric has risen by more than
    `max_increase` (Tango's score test for paired proportions, unconditional). The probability that any check of a fit
    that stays within the budget says so is at most `alpha`: it is spent in equal parts over the checks that are
    planned. What so few prompts can show is said at the start, in one line: with 20 prompts and ten checks, 8 of them
    must turn before a test can tell that from noise.

    ``"rollback"`` keeps the weights of the last check that did not reject (the start of the fit included) in
    ``safety_last_good.safetensors`` in the run folder, and puts them back bit for bit: all parameters and persistent
    buffers of the module. Not kept are those of a check that leaves out more than 10 % of the prompts, as these could
    not be told. The optimizer's state stays. Weights are put back once all monitors have looked at the step, so that
    what is logged is of the weights that the step made; checkpoints saved from then on, and monitors that look only
    when the fit has stopped, have the restored weights. The run folder takes up to twice the size of the weights, since
    those that the last checkpoint names are kept for a resumed fit, which goes on with the same baseline and plan.
    ``fast_dev_run`` keeps them in memory. Runs on a single device and under DDP, where every process decides alike and
    all must see the run folder; under FSDP2 it warns and stops, and does not roll back.

    Args:
        metric: A rate of prompts that should not rise, with or without ``safety/``: ``attack_success_rate``,
            ``over_refusal_rate``, or that of one judge, ``attack_success_rate/<judge>``.
        max_increase: How much it may rise, as a share of the prompts in [0, 1): 0.01 is one point.
        action: What to do: ``"warn"``; ``"stop"`` the fit; or ``"rollback"``, which restores the last good weights and
            stops.
        patience: After how many checks in a row that say so.
        alpha: The probability of a false alarm during the fit, in (0, 1).
        planned_checks: How many checks the fit will have after the first. None: counted from the monitor and the
            trainer. A resumed fit keeps the plan of the fit it resumes.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: An argument is out of range. At the start of a fit: there is no monitor, none checks the metric
            before the first step, the prompts are too few to detect anything, or the end of the fit is unknown. When a
            fit is resumed: the last good weights are gone.

    Example:
        >>> budget = SafetyBudget(action="rollback", max_increase=5)
        Traceback (most recent call last):
        ...
        ValueError: `max_increase` expected to be in [0, 1) but got 5. For 5 points, pass `max_increase=0.05`.
    """

    def __init__(
        self,
        metric: str = "safety/attack_success_rate",
        max_increase: float = 0.01,
        action: BudgetAction = "warn",
        patience: int = 1,
        alpha: float = 0.05,
        planned_checks: int | None = None,
    ) -> None:
        self.metric = f"safety/{metric.removeprefix('safety/')}"
        self.max_increase = check_margin(max_increase, "max_increase")
        check_choice(action, "action", get_args(BudgetAction))
        self.action = action
        self.patience = check_positive(patience, "patience")
        self.alpha = check_alpha(alpha)
        self.planned_checks = None if planned_checks is None else check_positive(planned_checks, "planned_checks")
        self._begin()

    def _begin(self) -> None:
        """Forget an earlier fit."""
        self._test: RepeatedComparison | None = None
        self._last_good = LastGoodWeights()
        self._last_step: int | None = None
        self._offered: list[str] = []
        # Why to stop, from the check that says so until all monitors have looked.
        self._reason: str | None = None

    @property
    def state_key(self) -> str:
        """The name under which a checkpoint keeps the state: one for each metric."""
        return self._generate_state_key(metric=self.metric)

    def state_dict(self) -> dict[str, Any]:
        """Return the baseline, the plan, what was found since, and which weights are good: primitives only."""
        if self._test is None:
            return {}
        return {
            "version": _STATE_VERSION,
            "before": dict(self._test.before),
            "planned_checks": self._test.planned_checks,
            "checks": self._test.checks,
            "in_a_row": self._test.in_a_row,
            "last_step": self._last_step,
            "last_good": self._last_good.state_dict(),
            "reason": self._reason,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the baseline and the plan of the fit that a checkpoint belongs to."""
        if state_dict.get("version") != _STATE_VERSION:
            raise ValueError(
                f"State of {type(self).__name__} expected to be version {_STATE_VERSION} but got"
                f" {state_dict.get('version')!r}. Resume with the version of lightning-safety that saved it."
            )
        self._test = self._make_test(state_dict["before"], state_dict["planned_checks"])
        self._test.checks, self._test.in_a_row = state_dict["checks"], state_dict["in_a_row"]
        self._last_step = state_dict["last_step"]
        self._last_good.load_state_dict(state_dict["last_good"])
        # Only a checkpoint that a listener saved between decision and act has one.
        self._reason = None if self.action == "warn" else state_dict.get("reason")

    # Hooks, in the order of a fit ---------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:  # noqa: ARG002
        """Refuse callbacks and strategies that this cannot work with, and begin anew unless a fit is continued."""
        if stage != "fit":
            return
        check_strategy(trainer, self, several=(*REPLICATED, SHARDED))
        bar = what_bars_a_budget(trainer, self.metric, self._siblings(trainer) if self.action == "rollback" else 0)
        if bar is not None:
            raise ValueError(bar)
        self._reason = None
        # A checkpoint's state is loaded after this.
        if trainer.global_step == 0:
            self._begin()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the last good weights of a fit that is resumed, before it trains."""
        if self._test is not None and self.action == "rollback":
            self._last_good.find(trainer, pl_module)

    def on_train_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,  # noqa: ARG002
        batch: Any,  # noqa: ARG002
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """Raise before the first step if there is nothing to compare with: all monitors have checked by now."""
        if self._test is None:
            raise ValueError(why_no_baseline(trainer, self.metric, self._offered, self.state_key))

    def on_safety_check(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str, check: Check) -> None:
        """Take the baseline, or compare with it and decide."""
        if stage != "fit":
            return
        self._offered += [f"safety/{name}" for name in check.outcomes if f"safety/{name}" not in self._offered]
        outcomes = check.outcomes.get(self.metric.removeprefix("safety/"))
        if outcomes is None:
            return
        measuring = [monitor for monitor in monitors_of(trainer) if self.metric in monitor.metrics]
        if len(measuring) > 1:
            raise ValueError(
                f"`metric` expected to be that of one monitor but {len(measuring)} measure {self.metric}. Give the"
                ' judge of one a name of its own and pass `metric="attack_success_rate/<judge>"`, or leave the others'
                " out."
            )
        # A checkpoint that another listener saves is of a check that we have heard of and its monitor has not finished.
        if self._last_step == trainer.global_step:
            return
        self._last_step = trainer.global_step
        if self._test is None:
            self._test = self._begin_test(trainer, measuring[0], outcomes)
            self._keep(trainer, pl_module)
        else:
            self._compare(trainer, pl_module, self._test, outcomes)

    def on_safety_checks_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Do what was decided: no monitor is still to look at the weights of this step."""
        if self._reason is None or self._test is None:
            return
        reason, self._reason = self._reason, None
        if self.action == "rollback":
            reason += f" Restored the weights of step {self._roll_back(trainer, pl_module, self._test)}."
        trainer.should_stop = True
        rank_zero_warn(f"{reason} The fit {when_it_stops(trainer)}.")

    # The start of a fit -------------------------------------------------------------------------------------------

    @staticmethod
    def _siblings(trainer: pl.Trainer) -> int:
        """Return how many budgets roll back."""
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        return sum(isinstance(callback, SafetyBudget) and callback.action == "rollback" for callback in callbacks)

    def _make_test(self, before: Mapping[str, bool | None], planned_checks: int) -> RepeatedComparison:
        return RepeatedComparison(
            before,
            max_increase=self.max_increase,
            alpha=self.alpha,
            planned_checks=planned_checks,
            patience=self.patience,
        )

    def _begin_test(
        self, trainer: pl.Trainer, monitor: SafetyMonitor, before: Mapping[str, bool | None]
    ) -> RepeatedComparison:
        """Take the baseline, and say what can be detected."""
        test = self._make_test(before, self.planned_checks or _planned(trainer, monitor))
        if test.smallest_increase is not None:
            rank_zero_info(what_can_be_detected(test, self.metric, self.action, trainer.global_step))
        elif leaves_files(trainer):
            raise ValueError(why_nothing_can_be_detected(test, self.metric))
        else:
            rank_zero_info(f"{why_nothing_can_be_detected(test, self.metric)} `fast_dev_run` goes on.")
        return test

    # A check ------------------------------------------------------------------------------------------------------

    def _keep(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.action == "rollback":
            self._last_good.keep(trainer, pl_module)

    def _compare(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        test: RepeatedComparison,
        outcomes: Mapping[str, bool | None],
    ) -> None:
        """Compare with the baseline; decide to act, wait, or keep the weights."""
        found = test.check(outcomes)
        step = trainer.global_step
        if leaves_files(trainer):
            for warning in what_is_weak(test, found, step, self.action):
                rank_zero_warn(warning)
        if found.rejected is False and not found.change.warning:
            self._keep(trainer, pl_module)
        if not found.rejected:
            return
        reason = what_was_found(test, found, self.metric, step)
        if not found.exceeded:
            rank_zero_info(f"{reason} It waits for {self.patience} such checks in a row.")
        elif self.action == "warn":
            rank_zero_warn(f"{reason} The fit goes on.")
        else:
            self._reason = reason

    def _roll_back(self, trainer: pl.Trainer, pl_module: pl.LightningModule, test: RepeatedComparison) -> int:
        """Restore the last good weights wherever the fit holds them, and return their step."""
        good = self._last_good.restore(pl_module)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            # Its optimizers hold the selected weights too.
            if isinstance(callback, SafetyEnhancementTuning):
                callback.refresh()
        test.in_a_row = 0
        return good.step


def _planned(trainer: pl.Trainer, monitor: SafetyMonitor) -> int:
    """Return how many checks are to come."""
    planned = count_planned_checks(trainer, monitor)
    if planned is None:
        raise ValueError(
            "`planned_checks` expected to be given: the trainer knows no end of the fit (`max_steps`, `max_epochs`, or"
            " the length of an epoch), and `alpha` is spent over all checks. Pass `planned_checks=20` for 20, or"
            " `Trainer(max_steps=…)`."
        )
    if planned == 0:
        raise ValueError(
            f"{type(monitor).__name__} expected to check after the first step but it will not. Set its `every_n_steps`,"
            " `every_n_epochs` or `at_end=True`."
        )
    return planned
