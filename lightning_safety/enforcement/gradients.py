# SPDX-License-Identifier: Apache-2.0
"""Following the gradient of a parameter as it is accumulated."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lightning_safety.language import canonical_name


def dense_gradient(name: str, parameter: Tensor) -> Tensor | None:
    """Return the gradient of `parameter`, None where it has none.

    Raises:
        RuntimeError: The gradient is sparse.
    """
    gradient = parameter.grad
    if gradient is not None:
        check_dense(name, gradient)
    return gradient


def check_dense(name: str, gradient: Tensor) -> None:
    """Refuse a sparse gradient, that of the parameter which a model calls `name`, by a RuntimeError."""
    if gradient.layout != torch.strided:
        raise RuntimeError(
            f"Gradient of `{canonical_name(name)}` expected to be dense but it is sparse. Build its embedding with"
            " `sparse=False`."
        )


def watch_gradient(parameter: Tensor, react: Callable[[], None]) -> RemovableHandle:
    """Call `react` whenever a gradient has been accumulated into `parameter`, which must require one."""
    register: Callable[..., RemovableHandle] = parameter.register_post_accumulate_grad_hook
    return register(lambda _: react())
