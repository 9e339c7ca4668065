# SPDX-License-Identifier: Apache-2.0
"""Switching a model to evaluation and back, so that no trace remains."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from lightning_safety.language.attention import FloatAttention


def uncompiled() -> AbstractContextManager[object]:
    """Run what ``torch.compile`` has compiled as it was written. Where nothing is compiled, the import is saved."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    stance: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return stance


@contextmanager
def evaluation_mode(model: nn.Module, *, use_cache: bool | None = None) -> Iterator[None]:
    """Put a model in evaluation mode, and afterwards every submodule back in the mode it was in.

    ``model.train(was_training)`` would not do: a module that the user keeps in evaluation mode inside a model that
    trains (a frozen encoder, a batch norm) would come back training.

    Args:
        model: The model.
        use_cache: The value of ``model.config.use_cache`` inside. None: as it is. The old value comes back either way.

    Example:
        >>> model = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
        >>> with evaluation_mode(model):
        ...     model[0].training
        False
        >>> model[0].training, model[1].training
        (True, False)
    """
    flags = [(module, module.training) for module in model.modules()]
    config: Any = getattr(model, "config", None)
    has_cache = hasattr(config, "use_cache")
    cache_before = config.use_cache if has_cache else None
    try:
        model.eval()
        if has_cache and use_cache is not None:
            config.use_cache = use_cache
        yield
    finally:
        for module, training in flags:
            # Past what modules look for in a value first, where they are not of their own kind: models with adapters
            # have thousands.
            plain = type(module).__setattr__ is nn.Module.__setattr__
            (object.__setattr__ if plain else setattr)(module, "training", training)
        if has_cache:
            config.use_cache = cache_before


@contextmanager
def differentiated_beside_training(model: nn.Module) -> Iterator[None]:
    """Differentiate other losses than that of a fit: evaluation mode without cache, gradients, no compiled code.

    Compiled code would leave out hooks that find gradients, and be compiled anew for every length. Attention is that of
    `FloatAttention`. The backward pass belongs inside.

    Args:
        model: The model.
    """
    with torch.enable_grad(), uncompiled(), FloatAttention(), evaluation_mode(model, use_cache=False):
        yield
