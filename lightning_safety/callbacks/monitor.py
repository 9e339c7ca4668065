# SPDX-License-Identifier: Apache-2.0
"""When a monitor looks during a fit, and what it writes each time: the part that all monitors share."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pytorch_lightning as pl

from lightning_safety.arguments import check_positive
from lightning_safety.callbacks.figures import show_figures
from lightning_safety.callbacks.log import (
    METRICS_FILE,
    Entry,
    fill_callback_metrics,
    leaves_files,
    log_to_loggers,
    record,
    run_folder,
)
from lightning_safety.callbacks.strategies import REPLICATED, check_strategy
from lightning_safety.processes import from_first, together
from lightning_safety.randomness import preserved_random_state

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Check:
    """One look.

    Attributes:
        metrics: Values by name, without ``safety/``.
        details: What else the line in ``safety.jsonl`` holds, such as intervals.
        replies: What the model replied, for the private file and, if asked, for loggers.
        outcomes: By metric, for those that are the rate of something among prompts: whether it happened, by prompt.
            None: that could not be told.
        figures: Pictures by name, without ``safety/``; drawn only where they are shown.
    """

    metrics: Mapping[str, float]
    details: Mapping[str, Any] = field(default_factory=dict)
    replies: tuple[Entry, ...] = ()
    outcomes: Mapping[str, Mapping[str, bool | None]] = field(default_factory=dict)
    figures: Mapping[str, Callable[[], Figure]] = field(default_factory=dict)


class SafetyListener(ABC):
    """A callback that hears of every check of every monitor, wherever it stands in the trainer's list."""

    @abstractmethod
    def on_safety_check(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str, check: Check) -> None:
        """Hear of a check, after it was logged; on every process.

        Args:
            trainer: The trainer.
            pl_module: The module.
            stage: ``"fit"``, ``"validate"`` or ``"test"``.
            check: What the monitor found. Its metrics' names are without ``safety/``.
        """

    def on_safety_checks_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: B027
        """Act on what was heard: every monitor has looked at this step of a fit, and no checkpoint was saved since.

        Called on every process after each hook of a fit in which monitors look, whether one did or not.

        Args:
            trainer: The trainer.
            pl_module: The module.
        """


class SafetyMonitor(pl.Callback, ABC):
    """Looks every so many steps or epochs, at the start and at the end of a fit, and once in ``validate`` and ``test``.

    A look changes nothing: random number generators come back as they were, and `measure` must leave the model so. It
    is one point in every logger at its optimizer step, one line of ``safety.jsonl``, and ``trainer.callback_metrics``.
    A fit that was killed and resumed has the same points as one that was not.

    Runs on a single device and under DDP, some under FSDP2 too. There every process looks, at the same steps; what the
    first one finds is what all have in ``trainer.callback_metrics``, and it alone writes. An error in one process ends
    all of them.

    Args:
        every_n_steps: Look every so many optimizer steps. None: not by steps.
        every_n_epochs: Look at the end of every so many epochs. None: not by epochs.
        at_start: Whether to look before the first step.
        at_end: Whether to look after the last step.
    """

    strategies: ClassVar[tuple[str, ...]] = REPLICATED
    """Of several processes, those under which the monitor runs."""

    def __init__(self, every_n_steps: int | None, every_n_epochs: int | None, at_start: bool, at_end: bool) -> None:
        self.every_n_steps = None if every_n_steps is None else check_positive(every_n_steps, "every_n_steps")
        self.every_n_epochs = None if every_n_epochs is None else check_positive(every_n_epochs, "every_n_epochs")
        self.at_start = at_start
        self.at_end = at_end
        self._metrics: dict[str, float] = {}
        self._begin_run()

    @property
    def metrics(self) -> dict[str, float]:
        """The values of the last check, by full name; empty before the first."""
        return dict(self._metrics)

    @property
    def _logged(self) -> dict[str, float]:
        # Each monitor has a check_seconds; where several look at one step, the plain name holds the last one's.
        seconds = self._metrics["safety/check_seconds"]
        return {**self._metrics, f"safety/check_seconds/{type(self).__name__}": seconds}

    @abstractmethod
    def measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Check | None:
        """Look at the model and leave it as it was; on every process, which may share the work.

        Returns:
            None where there is nothing to look at in this stage.
        """

    def publish(self, trainer: pl.Trainer, check: Check) -> None:
        """Do what else a monitor does with a check; on rank zero, after it was logged."""

    def write(self, folder: Path, check: Check, identity: Entry, replacing: Entry | None) -> None:
        """Write a check to the run folder; on rank zero.

        Args:
            folder: The run folder.
            check: What was found.
            identity: Monitor, run, stage and step of the check, which each of its lines repeats.
            replacing: What the lines hold that a killed fit left of this check; None: there can be none.
        """
        record(folder / METRICS_FILE, [{**identity, **self._metrics, **check.details}], replacing=replacing)

    def _begin_run(self) -> None:
        # Names the run in its files: one that was killed and resumed is one run, another fit in the same folder is not.
        self._run = uuid.uuid4().hex
        self._last_step: int | None = None
        self._counted_from: int | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the run's name, the step of the last check and the step from which steps are counted."""
        return {"run": self._run, "last_step": self._last_step, "counted_from": self._counted_from}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the run that a checkpoint belongs to."""
        self._run = state_dict["run"]
        self._last_step = state_dict["last_step"]
        self._counted_from = state_dict["counted_from"]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:  # noqa: ARG002
        """Refuse strategies that are not supported, and begin a run unless the trainer goes on with one."""
        check_strategy(trainer, self, several=self.strategies)
        self._metrics = {}
        # A checkpoint's state is loaded after this.
        if stage == "fit" and trainer.global_step == 0:
            self._begin_run()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check before the first step, or what was due when a checkpoint was saved."""
        if self._counted_from is None:
            self._counted_from = trainer.global_step
        if (self.at_start and self._last_step is None) or self._is_due(trainer):
            self._check_in_fit(trainer, pl_module)
        self._end_hook(trainer, pl_module)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,  # noqa: ARG002
        batch: Any,  # noqa: ARG002
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """Check by steps; by epochs and at the end already here, so that checkpoints after validation see it."""
        ends_epoch = trainer.is_last_batch
        if (
            self._is_due(trainer)
            or (ends_epoch and self._epoch_is_due(trainer))
            or (self.at_end and _ends_fit(trainer, ends_epoch))
        ):
            self._check_in_fit(trainer, pl_module)
        self._end_hook(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check by epochs or at the end, where the last batch was not known to be the last."""
        if self._epoch_is_due(trainer) or (self.at_end and _ends_fit(trainer, True)):
            self._check_in_fit(trainer, pl_module)
        if self._metrics:
            # Lightning would else let what was logged in on_train_start stand over what came after it.
            fill_callback_metrics(trainer, pl_module, self._logged)
        self._end_hook(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check at the end of a fit that something else stopped, such as EarlyStopping."""
        if self.at_end:
            self._check_in_fit(trainer, pl_module, hook_may_log=False)
        self._end_hook(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check in ``trainer.validate``; not in the validation or the sanity check of a fit."""
        if trainer.state.fn == "validate":
            self._check(trainer, pl_module, "validate")

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check in ``trainer.test``."""
        self._check(trainer, pl_module, "test")

    def _is_due(self, trainer: pl.Trainer) -> bool:
        """Whether a multiple of `every_n_steps` was reached, or passed by several optimizers, since the last check."""
        if self.every_n_steps is None:
            return False
        since = max(self._counted_from or 0, self._last_step or 0)
        return trainer.global_step // self.every_n_steps > since // self.every_n_steps

    def _epoch_is_due(self, trainer: pl.Trainer) -> bool:
        return self.every_n_epochs is not None and (trainer.current_epoch + 1) % self.every_n_epochs == 0

    def _check_in_fit(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *, hook_may_log: bool = True) -> None:
        # The same step may be due twice: by steps and at an epoch's end, or while gradients accumulate.
        if self._last_step != trainer.global_step:
            self._check(trainer, pl_module, "fit", hook_may_log=hook_may_log)
            self._last_step = trainer.global_step

    def _check(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str, *, hook_may_log: bool = True
    ) -> None:
        started = time.perf_counter()
        with together(f"The check of {type(self).__name__}"):
            with preserved_random_state():
                check = self.measure(trainer, pl_module)
            if check is None:
                return
            if trainer.is_global_zero:
                show_figures(trainer, check.figures)
            # Processes that differed by a rounding, let alone by their clocks, could decide differently.
            found = (dict(check.metrics), dict(check.outcomes), time.perf_counter() - started)
            metrics, outcomes, seconds = from_first(found)
            check = replace(check, metrics=metrics, outcomes=outcomes)
            self._metrics = {f"safety/{name}": value for name, value in {**metrics, "check_seconds": seconds}.items()}
            fill_callback_metrics(trainer, pl_module, self._logged, hook_may_log=hook_may_log)
            if trainer.is_global_zero:
                self._write_down(trainer, stage, check)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, SafetyListener):
                callback.on_safety_check(trainer, pl_module, stage, check)

    def _end_hook(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Tell listeners, where this is the last monitor in the list, that all have looked."""
        if self is not monitors_of(trainer)[-1]:
            return
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, SafetyListener):
                callback.on_safety_checks_end(trainer, pl_module)

    def _write_down(self, trainer: pl.Trainer, stage: str, check: Check) -> None:
        log_to_loggers(trainer, self._logged)
        self.publish(trainer, check)
        if leaves_files(trainer):
            identity = {"monitor": type(self).__name__, "run": self._run, "stage": stage, "step": trainer.global_step}
            # Only a fit comes to the same check again, when it is resumed; each `validate` and `test` is a new one.
            self.write(run_folder(trainer), check, identity, identity if stage == "fit" else None)


def monitors_of(trainer: pl.Trainer) -> list[SafetyMonitor]:
    """Return the monitors among the trainer's callbacks."""
    return [callback for callback in trainer.callbacks if isinstance(callback, SafetyMonitor)]  # type: ignore[attr-defined]


def _ends_fit(trainer: pl.Trainer, ends_epoch: bool) -> bool:
    """Whether the fit is known to end here, by steps or by epochs."""
    by_steps = 0 <= trainer.max_steps <= trainer.global_step
    epochs = trainer.max_epochs
    by_epochs = ends_epoch and epochs is not None and 0 <= epochs <= trainer.current_epoch + 1
    return by_steps or by_epochs
