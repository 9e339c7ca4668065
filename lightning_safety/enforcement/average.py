# SPDX-License-Identifier: Apache-2.0
"""The mean of trained weights over the last steps of a fit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_safety.enforcement.compact import CompactTraining
from lightning_safety.enforcement.sparse_delta import SparseDelta


class AveragedWeights:
    """The running mean of the selected weights over optimizer steps.

    Under a learning rate that does not fall, weights wander around a minimum, and where a model stands between refusing
    and answering changes from step to step; their mean stands still ("Averaging Weights Leads to Wider Optima and
    Better Generalization", arXiv 1803.05407). Only selected weights are summed, in float64: 8 bytes each.

    Args:
        training: What trains them, attached.
    """

    def __init__(self, training: CompactTraining | SparseDelta) -> None:
        self._training = training
        self.steps = 0
        self._sums: dict[str, Tensor] = {}

    def add(self) -> None:
        """Take the present weights into the mean."""
        for name, entries in self._training.entries().items():
            self._sums[name] = entries.double() + self._sums[name] if self.steps else entries.double()
        self.steps += 1

    def settle(self) -> None:
        """Write the mean into the model and its optimizers. Without a step, nothing changes."""
        if self.steps:
            self._training.write({name: total / self.steps for name, total in self._sums.items()})

    def state_dict(self) -> dict[str, Any]:
        """Return the sums, and over how many steps."""
        return {"steps": self.steps, "sums": {name: total.cpu() for name, total in self._sums.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with a mean that was begun."""
        devices = {name: entries.device for name, entries in self._training.entries().items()}
        self.steps = state["steps"]
        self._sums = {name: total.to(devices[name], torch.float64) for name, total in state["sums"].items()}
