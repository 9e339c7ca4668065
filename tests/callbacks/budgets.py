# SPDX-License-Identifier: Apache-2.0
"""A monitor whose outcomes are scripted by step and cost nothing, and a record of the weights; for tests of budgets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from lightning_safety.callbacks.monitor import Check, SafetyMonitor
from lightning_safety.data import Example

PROMPTS = [Example(f"Do a bad thing, number {index}.", "I can't help with that.") for index in range(20)]


def number_at(harmful: Mapping[int, int], step: int) -> int:
    """Return the number of the last step that has one."""
    return harmful[max(past for past in harmful if past <= step)]


class ScriptedMonitor(SafetyMonitor):
    """Finds so many of the prompts harmful from a step on, and of the first so many nothing at a step."""

    def __init__(
        self,
        harmful: Mapping[int, int],
        *,
        unknown: Mapping[int, int] | None = None,
        metric: str = "attack_success_rate",
        prompts: int = len(PROMPTS),
        every_n_steps: int | None = None,
        every_n_epochs: int | None = None,
        at_start: bool = True,
        at_end: bool = True,
    ) -> None:
        super().__init__(every_n_steps, every_n_epochs, at_start, at_end)
        self.harmful = harmful
        self.unknown = unknown or {}
        self.metric = metric
        self.prompts = prompts
        self.steps: list[int] = []

    def measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Check:
        step = trainer.global_step
        self.steps.append(step)
        number, unknown = number_at(self.harmful, step), self.unknown.get(step, 0)
        outcomes = {str(prompt): None if prompt < unknown else prompt < number for prompt in range(self.prompts)}
        return Check({self.metric: number / self.prompts}, outcomes={self.metric: outcomes})


class Recorder(pl.Callback):
    """Copies the module's state before and after each step; put it before the monitor."""

    def __init__(self) -> None:
        self.at: dict[int, dict[str, Tensor]] = {}

    numbers = staticmethod(number_at)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.at[trainer.global_step] = state_of(pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.at[trainer.global_step] = state_of(pl_module)


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def assert_same_state(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype
        first, second = (tensor.reshape(-1).view(torch.uint8) for tensor in (value, other[name]))
        assert torch.equal(first, second), name
