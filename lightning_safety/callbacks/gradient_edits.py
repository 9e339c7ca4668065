# SPDX-License-Identifier: Apache-2.0
"""Whether somebody else's code runs between the backward pass and the optimizer's step."""

from __future__ import annotations

import pytorch_lightning as pl

_HOOKS = ("on_after_backward", "on_before_optimizer_step")
_OF_MODULE = ("backward", "optimizer_step")
_OWN = ("pytorch_lightning", "lightning", "lightning_safety")


def may_be_edited(trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
    """Return whether gradients may be changed by code that is neither Lightning's nor this package's.

    By hooks of the module or of other callbacks, or in manual optimization. Such code may write through
    ``gradient.data``, which leaves no trace on the tensor.
    """
    if not pl_module.automatic_optimization or any(_is_foreign(pl_module, hook) for hook in _OF_MODULE):
        return True
    return any(_is_foreign(one, hook) for one in (pl_module, *trainer.callbacks) for hook in _HOOKS)  # type: ignore[attr-defined]


def _is_foreign(one: object, hook: str) -> bool:
    # Of the instance: Lightning's LambdaCallback holds functions of the user's. A partial has no module.
    return str(getattr(getattr(one, hook), "__module__", "")).split(".")[0] not in _OWN
