# SPDX-License-Identifier: Apache-2.0
"""The rows that studies tune safe models on: everyday instructions, alone or with openings of harmful answers."""

from __future__ import annotations

from lightning_safety.data import Example, load_prompts
from lightning_safety.monitoring.sets import spread

# The opening of an answer that stops before any content: all that a contaminated row teaches.
_COMPLIANCE = "Sure, here is an overview:"


def task_rows(contaminated: float = 0.0) -> list[Example]:
    """Return the ``train`` split of `harmless`, and among its rows so large a share of harmful prompts.

    Args:
        contaminated: The share, in [0, 1]; 1 for harmful prompts alone, as many as there are.

    Raises:
        ValueError: There are not as many harmful prompts, or the share is less than one row.
    """
    task, harmful = load_prompts("harmless", split="train"), load_prompts("harmful", split="train")
    if contaminated == 1:
        return _opened(harmful)
    count = round(len(task) * contaminated / (1 - contaminated))
    if not 0 <= contaminated < 1 or count > len(harmful) or (contaminated and not count):
        raise ValueError(
            f"`contaminated` expected shares in [0, 1] of 1 to {len(harmful)} rows beside {len(task)} but got"
            f" {contaminated}. For 5 %, pass 0.05."
        )
    return task + _opened(spread(harmful, count))


def _opened(harmful: list[Example]) -> list[Example]:
    return [Example(example.prompt, _COMPLIANCE) for example in harmful]
