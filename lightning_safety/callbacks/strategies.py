# SPDX-License-Identifier: Apache-2.0
"""Which strategies our callbacks run under."""

from __future__ import annotations

from typing import Any


def check_strategy(trainer: Any, callback: object) -> None:
    """Raise unless the trainer runs on a single device.

    Args:
        trainer: A Trainer of ``pytorch_lightning`` or ``lightning.pytorch``.
        callback: Who asks, for the message.

    Raises:
        ValueError: The strategy spreads the model or the data over devices or processes.
    """
    # By name: the classes of the two Lightning packages differ.
    single = any(base.__name__ == "SingleDeviceStrategy" for base in type(trainer.strategy).__mro__)
    if not single or trainer.world_size != 1:
        raise ValueError(
            f"`strategy` expected to run on a single device but got {type(trainer.strategy).__name__} with "
            f"{trainer.world_size} process(es), which {type(callback).__name__} does not support yet. "
            f'Pass `Trainer(devices=1, strategy="auto")`.'
        )
