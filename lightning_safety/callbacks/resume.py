# SPDX-License-Identifier: Apache-2.0
"""Continuing a fit as if it had not been interrupted: random numbers, and loaders that cannot."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import pytorch_lightning as pl

from lightning_safety.processes import gather, rank, world_size
from lightning_safety.randomness import restore_random_state
from lightning_safety.scoring import SafetyObjective


def of_all_processes(state: dict[str, Any], trainer: pl.Trainer) -> dict[str, Any] | list[dict[str, Any]]:
    """Return the random states of all processes, or the one where there is one, or after an error.

    Then the process that failed saves alone, and the others do not come.
    """
    return state if world_size() == 1 or trainer.interrupted else gather(state)


def restores_late(trainer: pl.Trainer) -> bool:
    """Whether the strategy loads a checkpoint after ``on_fit_start``: there, weights and states are not yet known."""
    return bool(trainer.strategy.restore_checkpoint_after_setup)


class CallbackWithRandomness(pl.Callback):
    """A callback whose state holds, under ``random``, that of the random number generators of all processes."""

    def __init__(self) -> None:
        super().__init__()
        self._randomness = ResumedRandomness()

    def on_load_checkpoint(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,  # noqa: ARG002
        checkpoint: dict[str, Any],
    ) -> None:
        """Take up the random numbers where checkpoints are loaded after ``on_fit_start``."""
        state = checkpoint["callbacks"].get(self.state_key)
        if state and trainer.state.fn == "fit" and restores_late(trainer):
            self._randomness.at_fit_start(state["random"])

    def on_save_checkpoint(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,  # noqa: ARG002
        checkpoint: dict[str, Any],
    ) -> None:
        """Add the states of other processes: what Lightning saves is the first one's, and each draws other numbers."""
        state = checkpoint["callbacks"].get(self.state_key)
        if state:
            state["random"] = of_all_processes(state["random"], trainer)


class ResumedRandomness:
    """Gives a resumed fit the random numbers that the uninterrupted one would have drawn.

    Two moments matter. Lightning makes the iterator of the training loader, which draws a seed and a shuffled order,
    between ``on_fit_start`` and ``on_train_start``. Where the next batch begins an epoch, the uninterrupted fit makes
    it too, after the checkpoint: the state must be back before. Where it continues an epoch, the uninterrupted fit
    made it long ago: the state must be back after. Restoring is repeatable, so that any number of callbacks may do it.
    """

    def __init__(self) -> None:
        self._state: dict[str, Any] | None = None

    def at_fit_start(self, state: dict[str, Any] | list[dict[str, Any]] | None) -> None:
        """Restore a state as the last thing in ``on_fit_start``, or when it is loaded after that.

        Args:
            state: Of `capture_random_state`, or such of all processes. None: not resumed.
        """
        self._state = None if state is None else _own_state(state)
        if self._state is not None:
            restore_random_state(self._state)

    def at_train_start(self, trainer: pl.Trainer) -> None:
        """Restore it again in ``on_train_start``, if an epoch is continued."""
        if self._state is not None and continues_epoch(trainer):
            restore_random_state(self._state)
        self._state = None


def _own_state(state: dict[str, Any] | list[dict[str, Any]]) -> dict[str, Any] | None:
    states = state if isinstance(state, list) else [state]
    if len(states) == world_size():
        return states[rank()]
    if rank() == 0:
        warnings.warn(
            f"The checkpoint was saved by {len(states)} process(es) and is resumed by {world_size()}: random numbers do"
            " not continue those of the fit that saved it.",
            stacklevel=4,
        )
    return None


def check_state_version(callback: object, state: Mapping[str, Any], version: int) -> None:
    """Refuse the state of a callback that another version of this package saved.

    Raises:
        ValueError: It is of another version.
    """
    if state.get("version") != version:
        raise ValueError(
            f"State of {type(callback).__name__} expected to be version {version} but got {state.get('version')!r}."
            " Resume with the version of lightning-safety that saved it."
        )


def continues_epoch(trainer: pl.Trainer) -> bool:
    """Whether the next training batch is not the first of an epoch; for ``on_train_start``."""
    progress = trainer.fit_loop.epoch_loop.batch_progress
    return progress.current.ready > 0 and not progress.is_last_batch


def warn_of_loaders_that_start_over(trainer: pl.Trainer) -> None:
    """Warn of each training loader that starts its epoch over although the fit continues one."""
    if not continues_epoch(trainer):
        return
    for loader in _loaders(trainer.train_dataloader):
        if not (hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")):
            dataset = getattr(loader, "dataset", None)
            over = "" if dataset is None else f" over {type(dataset).__name__}"
            warnings.warn(
                f"{type(loader).__name__}{over} cannot continue in the middle of an epoch: the resumed fit sees its"
                " first batches again, and ends with other weights than an uninterrupted one. Held weights stay held."
                " Give the loader `state_dict` and `load_state_dict`, or resume from a checkpoint of an epoch's end.",
                stacklevel=2,
            )


def _loaders(loaders: Any) -> Iterator[Any]:
    """Yield the loaders in what a LightningModule may return: one, or nested lists and mappings of them."""
    if isinstance(loaders, Mapping):
        loaders = list(loaders.values())
    if isinstance(loaders, list | tuple):
        for loader in loaders:
            yield from _loaders(loader)
    elif loaders is not None:
        yield loaders


def warn_of_lost_objective(trainer: pl.Trainer, callback: object, objective: SafetyObjective, restored: Any) -> None:
    """Say so where a resumed fit prepared an objective on weights that are trained already.

    Args:
        trainer: The trainer.
        callback: Whose objective it is.
        objective: The objective.
        restored: What the checkpoint has of it.
    """
    prepares = type(objective).prepare is not SafetyObjective.prepare
    if trainer.ckpt_path is not None and prepares and not restored:
        warnings.warn(
            f"The checkpoint has no state of {type(callback).__name__} for {type(objective).__name__}: what is"
            " rehearsed is what the model does in the checkpoint, not before its fit began.",
            stacklevel=2,
        )
