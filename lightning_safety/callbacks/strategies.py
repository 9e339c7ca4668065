# SPDX-License-Identifier: Apache-2.0
"""Which strategies our callbacks run under."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

_PACKAGES = ("pytorch_lightning", "lightning")

_POPEN = "popen"

REPLICATED = ("DDPStrategy",)
"""The strategies under which every process holds the whole model, for `check_strategy`."""

SHARDED = "ModelParallelStrategy"
"""That under which FSDP2 spreads the weights over processes."""


def check_strategy(trainer: Any, callback: object, *, several: Collection[str] = ()) -> None:
    """Raise unless the trainer runs on a single device.

    Args:
        trainer: A Trainer of ``pytorch_lightning`` or ``lightning.pytorch``.
        callback: Who asks, for the message.
        several: The names of the classes of strategies for several devices that will do as well.

    Raises:
        ValueError: The strategy spreads the model or the data over devices or processes.
    """
    # By name: the classes of the two Lightning packages differ. The nearest of theirs counts: DeepSpeed's is a DDP too.
    bases = type(trainer.strategy).__mro__
    nearest = next((base.__name__ for base in bases if base.__module__.split(".")[0] in _PACKAGES), "")
    single = any(base.__name__ == "SingleDeviceStrategy" for base in bases) and trainer.world_size == 1
    if not single and nearest not in several:
        others = f", or one of {' and '.join(several)}" if several else ""
        raise ValueError(
            f"`strategy` expected to run on a single device but got {type(trainer.strategy).__name__} with "
            f"{trainer.world_size} process(es), which {type(callback).__name__} does not support yet. "
            f'Pass `Trainer(devices=1, strategy="auto")`{others}.'
        )


def check_start_method(trainer: Any, callback: object) -> None:
    """Raise where what a callback leaves in its attributes would be lost with the processes that fit.

    Args:
        trainer: As for `check_strategy`.
        callback: Who asks, for the message.

    Raises:
        ValueError: The strategy forks or spawns processes.
    """
    # Of DDP in all its kinds; the other strategies start their processes in one way only.
    start_method = getattr(trainer.strategy, "_start_method", _POPEN)
    if start_method != _POPEN:
        raise ValueError(
            f"`start_method` expected to be {_POPEN!r} but got {start_method!r}: Lightning brings weights and metrics"
            f" back from such processes, but not what {type(callback).__name__} finds. Run a script with"
            ' `Trainer(strategy="ddp")`, or one device in a notebook.'
        )
