# SPDX-License-Identifier: Apache-2.0
"""The callbacks that we recommend for tuning an aligned model on a task."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytorch_lightning as pl

from lightning_safety.callbacks.harmfulness import HarmfulnessMonitor
from lightning_safety.callbacks.rehearsal import SafetyRehearsal
from lightning_safety.callbacks.rehearsal_need import LOOK_EVERY

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What they take at most in training steps on batches of four short rows under bfloat16 autocast: at every fourth step
# rehearsals took 14 % (docs/preserving.md); of a look, see benchmarks/README.md.
_STEPS_PER_REHEARSAL, _STEPS_PER_LOOK = 0.5, 0.15
# With rarer fixed steps the judges came to disagree in a long fit (docs/preserving.md).
_RAREST = 4


def preserve_safety(
    budget: float = 0.15,
    *,
    tokenizer: PreTrainedTokenizerBase | str | None = None,
    language_model: str | None = None,
) -> list[pl.Callback]:
    """Return the callbacks for tuning a model that is safe on a task that says nothing about safety.

    They are a `SafetyRehearsal` of the model's own replies and a `HarmfulnessMonitor` that shows whether it works. With
    a budget of 12.5 % or more it rehearses at every so-manieth step, which held beside harmful rows in the data too;
    with less only where a look finds it needed. Why these: what we measured of others is in ``docs/preserving.md``.
    Both run on a single device, under DDP and under FSDP2.

    Args:
        budget: The extra training time to spend on rehearsals, as a share, at least 0.01: about so much at fixed
            steps, at most so much where needed, if a step takes four short rows; less where it takes more. The replies
            at the start and the monitor's checks come on top.
        tokenizer: The tokenizer or its path. Default: it is looked for.
        language_model: The dotted name of the language model in the module, where there are several.

    Raises:
        ValueError: `budget` is out of range.

    Example:
        >>> import pytorch_lightning as pl
        >>> trainer = pl.Trainer(callbacks=preserve_safety(budget=0.1), accelerator="cpu", logger=False)
        >>> preserve_safety(budget=15)
        Traceback (most recent call last):
        ...
        ValueError: `budget` expected to be a share of the training time in [0.01, 1] but got 15. For 15 %, pass 0.15.
    """
    if isinstance(budget, bool) or not isinstance(budget, int | float) or not 0.01 <= budget <= 1:
        raise ValueError(
            f"`budget` expected to be a share of the training time in [0.01, 1] but got {budget!r}. For 15 %,"
            " pass 0.15."
        )
    every = math.ceil(_STEPS_PER_REHEARSAL / budget)
    # At most one look and one rehearsal come to twice so many steps.
    look_every = math.ceil((_STEPS_PER_REHEARSAL + _STEPS_PER_LOOK) / 2 / budget)
    return [
        SafetyRehearsal(
            every if every <= _RAREST else "adaptive",
            watch_every_n_steps=max(LOOK_EVERY, look_every),
            tokenizer=tokenizer,
            language_model=language_model,
        ),
        HarmfulnessMonitor(tokenizer=tokenizer, language_model=language_model),
    ]
