# SPDX-License-Identifier: Apache-2.0
"""Learning rate schedules as multipliers of the learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable

SCHEDULES = ("constant", "cosine", "linear")


def make_schedule(name: str, *, warmup_steps: int, total_steps: float) -> Callable[[int], float]:
    """Return the function from optimizer step (from 0) to multiplier of the learning rate.

    It rises in equal parts to 1 at step ``warmup_steps``, so that no step is lost at a rate of 0. Then it stays there,
    or falls along half a cosine or a line, and would reach 0 at step ``total_steps``.

    Args:
        name: ``"constant"``, ``"cosine"`` or ``"linear"``.
        warmup_steps: Steps below the full rate, at least 0.
        total_steps: Steps in all; may be infinite if `name` is ``"constant"``.

    Example:
        >>> schedule = make_schedule("linear", warmup_steps=1, total_steps=5)
        >>> [schedule(step) for step in range(5)]
        [0.5, 1.0, 0.75, 0.5, 0.25]
    """

    def multiplier(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        if name == "constant":
            return 1.0
        progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
        return 1.0 - progress if name == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))

    return multiplier
