# SPDX-License-Identifier: Apache-2.0
"""Saved states of optimizers that hold other parameters than the model's: selected weights only."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
from torch import Tensor
from torch.optim import Optimizer


class SavedElsewhere:
    """Keeps Lightning's `ModelParallelStrategy` from saving what some optimizers hold, until `remove`.

    It saves states by the names of the model's parameters, and these optimizers hold others. Whoever put them there
    saves the states. Other optimizers, those of a later fit for instance, are saved as ever.

    Args:
        strategy: The trainer's.
        optimizers: Those whose states are saved elsewhere.
    """

    def __init__(self, strategy: Any, optimizers: Sequence[Optimizer]) -> None:
        self._strategy = strategy
        self._optimizers = list(optimizers)
        self._save = strategy.optimizer_state
        strategy.optimizer_state = self._state

    def remove(self) -> None:
        """Let it save them again. A second time it does nothing."""
        vars(self._strategy).pop("optimizer_state", None)

    def _state(self, optimizer: Any) -> dict[str, Any]:
        # Lightning may pass its own wrapper.
        found = getattr(optimizer, "_optimizer", optimizer)
        return {} if any(found is one for one in self._optimizers) else dict(self._save(optimizer))


class LoadedElsewhere:
    """Keeps Lightning's `ModelParallelStrategy` from loading what optimizers hold, the next time it loads a checkpoint.

    Args:
        strategy: The trainer's.
    """

    def __init__(self, strategy: Any) -> None:
        self._strategy = strategy
        self._load = strategy.load_checkpoint
        strategy.load_checkpoint = self._load_the_rest

    def remove(self) -> None:
        """Let it load them again. A second time it does nothing."""
        vars(self._strategy).pop("load_checkpoint", None)

    def _load_the_rest(self, *args: Any, **kwargs: Any) -> Any:
        self.remove()
        optimizers = self._strategy.optimizers
        self._strategy.optimizers = []
        try:
            return self._load(*args, **kwargs)
        finally:
            self._strategy.optimizers = optimizers


def check_saved_states(
    checkpoint: Mapping[str, Any], state: Mapping[str, Any] | None, similar: Collection[str], key: str, *, sharded: bool
) -> None:
    """Refuse a checkpoint whose optimizers a fit that trains selected weights cannot go on with.

    Args:
        checkpoint: The whole.
        state: What it has of the callback that trains selected weights; None: nothing.
        similar: The names of the states that it has of other such callbacks.
        key: The name of that state.
        sharded: Whether the strategy of this fit shards the model. Such a fit has the optimizers' states under
            ``optimizers`` in that of the callback.

    Raises:
        ValueError: The optimizers have trained whole tensors, the other kind of strategy has saved them, or nobody has.
    """
    if state is not None and ("optimizers" in state) == sharded:
        return
    if state is not None:
        kinds = ["leaves the model whole", "shards the model"]
        after = ", or after an error" if sharded else ""
        raise ValueError(
            f"`ckpt_path` expected to have the optimizers' states as a fit does whose strategy {kinds[sharded]} but it"
            f" was saved under one that {kinds[not sharded]}{after}. Resume it as it was saved, resume an earlier one,"
            " or start a new fit from its weights, with its mask."
        )
    if sharded:
        found = f"has {' and '.join(similar)}" if similar else "has none of such a callback"
        raise ValueError(
            f"`ckpt_path` expected to have the state of {key}, with what its optimizers hold, but it {found}. Pass the"
            " arguments of the callback that it was saved with, or start a new fit from its weights, with a mask."
        )
    states = [
        one for optimizer in checkpoint.get("optimizer_states", ()) for one in optimizer.get("state", {}).values()
    ]
    if any(isinstance(value, Tensor) and value.dim() > 1 for one in states for value in one.values()):
        raise ValueError(
            f"`ckpt_path` expected to be a checkpoint of a fit with {key.partition('{')[0]} but its optimizer trained"
            " whole tensors. Start a new fit from its weights: load them with `load_from_checkpoint`, and leave"
            " `ckpt_path` out."
        )


def check_base(trainer: pl.Trainer, restored: Mapping[str, Any], *, sparse: bool, sharded: bool) -> None:
    """Refuse what weights that train beside a base that stands still do not allow.

    Args:
        trainer: The trainer.
        restored: The state of the callback that is resumed; empty where none is.
        sparse: Whether weights train beside the base.
        sharded: Whether the strategy shards the model.

    Raises:
        ValueError: There are several processes, or the base of the resumed fit trained where this one does not or the
            other way round.
    """
    if sparse and (trainer.world_size > 1 or sharded):
        raise ValueError(
            "`strategy` expected to run in one process where the base is frozen or quantised but"
            f" {type(trainer.strategy).__name__} {'shards it' if sharded else f'runs {trainer.world_size}'}. Pass"
            ' `Trainer(devices=1, strategy="auto")`, or unfreeze the selected weights.'
        )
    if restored and sparse != ("trained" in restored):
        raise ValueError(
            "`ckpt_path` expected to be a checkpoint of a fit whose base was frozen or quantised alike, but the"
            f" selected weights {'were trained in the model' if sparse else 'were frozen or quantised'} there."
            " Freeze and load the model as that fit did, or start a new fit from the weights."
        )
