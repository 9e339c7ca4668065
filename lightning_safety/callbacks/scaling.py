# SPDX-License-Identifier: Apache-2.0
"""How a gradient scaler has scaled the gradients that a callback sees before an optimizer's step."""

from __future__ import annotations

import pytorch_lightning as pl
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
