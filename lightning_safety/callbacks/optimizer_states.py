# SPDX-License-Identifier: Apache-2.0
"""Saved states of optimizers that hold other parameters than the model's: selected weights only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


class WithoutOptimizerStates:
    """Keeps Lightning's `ModelParallelStrategy` from saving and loading what optimizers hold, until `remove`.

    It saves them by the names of the model's parameters, and loads them before a fit has put others in their place.
    Whoever has put them there saves and loads them.

    Args:
        strategy: The trainer's.
    """

    def __init__(self, strategy: Any) -> None:
        self._strategy = strategy
        self._load_checkpoint = strategy.load_checkpoint
        strategy.optimizer_state = self._no_state
        strategy.load_checkpoint = self._load_the_rest

    def remove(self) -> None:
        """Let it save and load them again. A second time it does nothing."""
        for name in ("optimizer_state", "load_checkpoint"):
            vars(self._strategy).pop(name, None)

    def _no_state(self, optimizer: Optimizer) -> dict[str, Any]:  # noqa: ARG002
        return {}

    def _load_the_rest(self, *args: Any, **kwargs: Any) -> Any:
        optimizers = self._strategy.optimizers
        self._strategy.optimizers = []
        try:
            return self._load_checkpoint(*args, **kwargs)
        finally:
            self._strategy.optimizers = optimizers


def check_saved_states(
    checkpoint: Mapping[str, Any], state: Mapping[str, Any] | None, name: str, *, sharded: bool
) -> None:
    """Refuse a checkpoint whose optimizers a fit that trains selected weights cannot go on with.

    Args:
        checkpoint: The whole.
        state: What it has of the callback that trains selected weights; None: nothing.
        name: The class of the callback.
        sharded: Whether the strategy of this fit shards the model. Such a fit has the optimizers' states under
            ``optimizers`` in that of the callback.

    Raises:
        ValueError: The optimizers have trained whole tensors, or the other kind of strategy has saved them.
    """
    if state is not None and ("optimizers" in state) == sharded:
        return
    if state is not None:
        kinds = ["leaves the model whole", "shards the model"]
        raise ValueError(
            f"`ckpt_path` expected to be resumed under the kind of strategy that saved it but that"
            f" {kinds[not sharded]} and this one {kinds[sharded]}. Resume it as it was saved, or start a new fit from"
            " its weights, with its mask."
        )
    states = [
        one for optimizer in checkpoint.get("optimizer_states", ()) for one in optimizer.get("state", {}).values()
    ]
    # What a sharded checkpoint has of optimizers is not loaded.
    if sharded or any(isinstance(value, Tensor) and value.dim() > 1 for one in states for value in one.values()):
        raise ValueError(
            f"`ckpt_path` expected to be a checkpoint of a fit with {name} but its optimizer trained whole tensors."
            " Start a new fit from its weights: load them with `load_from_checkpoint`, and leave `ckpt_path` out."
        )
