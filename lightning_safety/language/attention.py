# SPDX-License-Identifier: Apache-2.0
"""Attention in float32 where that of a processor is slow in bfloat16."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode


class FloatAttention(TorchFunctionMode):
    """Computes the scaled dot-product attention of a processor in float32 where bfloat16 is asked for, and rounds then.

    In bfloat16 the backward pass of torch's fused attention takes two to three times as long there as in float32
    (torch 2.13, AVX512-BF16), and a fifth of the backward pass of a model with few, short rows. It acts as a context;
    the backward pass belongs inside, for what gradient checkpoints compute again. Other devices, dtypes and ways to
    attend stay as they are.

    Example:
        >>> query = torch.ones(1, 1, 2, 4, dtype=torch.bfloat16)
        >>> with FloatAttention():
        ...     functional.scaled_dot_product_attention(query, query, query).dtype
        torch.bfloat16
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run `func`, with tensors in float32 if it is such an attention."""
        given = kwargs or {}
        if func is not functional.scaled_dot_product_attention:
            return func(*args, **given)
        query = args[0] if args else given["query"]
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
        if query.device.type != "cpu" or dtype != torch.bfloat16:
            return func(*args, **given)
        with torch.autocast("cpu", enabled=False):
            found = func(*map(_in_float32, args), **{name: _in_float32(value) for name, value in given.items()})
            return found.bfloat16()


def _in_float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
