# SPDX-License-Identifier: Apache-2.0
"""What mixed precision does to what a callback sees: scaled gradients, and autocast."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytorch_lightning as pl
import torch
from torch.optim import Optimizer


def gradient_scales(trainer: pl.Trainer, optimizer: Optimizer) -> tuple[float, float]:
    """Return the scaler's scale, and what gradients in ``on_before_optimizer_step`` are still multiplied by.

    Both are 1 without a scaler. The second is the scale for optimizers that undo it in their own step (fused ones);
    for all others Lightning has undone it by then.
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None or not scaler.is_enabled():
        return 1.0, 1.0
    scale = float(scaler.get_scale())
    return scale, scale if getattr(optimizer, "_step_supports_amp_scaling", False) else 1.0


def autocast_of(trainer: pl.Trainer) -> AbstractContextManager[Any]:
    """Return the autocast that the trainer's training steps run under, or a context that does nothing.

    Lightning's own keeps no cast weights, as training changes them. Here none changes: each is cast once.
    """
    given: AbstractContextManager[Any] = getattr(trainer.precision_plugin, "autocast_context_manager", nullcontext)()
    return torch.autocast(given.device, dtype=given.fast_dtype) if isinstance(given, torch.autocast) else given
