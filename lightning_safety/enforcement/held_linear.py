# SPDX-License-Identifier: Apache-2.0
"""A linear layer whose weight is lessened at a few entries, by values that train, for the time of a product."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from lightning_safety.enforcement.matrix_entries import MatrixEntries

Scratch = dict[tuple[torch.Size, torch.device], Tensor]
"""A matrix of each shape to build lessened weights in, so that none is allocated for every product."""


def held_linear(
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    values: Tensor,
    entries: MatrixEntries,
    places: Tensor,
    scratch: Scratch,
) -> Tensor:
    """Return ``inputs @ (W − C)ᵀ + b`` for the sparse matrix C; differentiable in inputs, bias and values.

    What a product with C costs, most of it for turning activations around, is saved: copying W costs less where there
    are many tokens. W itself is never written to.

    Args:
        inputs: float32 [..., in].
        weight: float32 [out, in]; takes no gradient.
        bias: [out], or None.
        values: float32 [entries]: the entries of C.
        entries: Where they stand.
        places: The same as flat (row-major) indices: int32 or int64 [entries].
        scratch: Where the matrices are kept between calls.

    Returns:
        float32 [..., out].
    """
    apply: Any = _HeldLinear.apply
    result: Tensor = apply(inputs, weight, bias, values, entries, places, scratch)
    return result


class _HeldLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        values: Tensor,
        entries: MatrixEntries,
        places: Tensor,
        scratch: Scratch,
    ) -> Tensor:
        ctx.save_for_backward(inputs, weight, values)
        ctx.entries, ctx.places, ctx.scratch = entries, places, scratch
        return functional.linear(inputs, _lessened(weight, values, places, scratch), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight, values = ctx.saved_tensors
        inputs_gradient = bias_gradient = values_gradient = None
        if ctx.needs_input_grad[0]:
            inputs_gradient = gradient @ _lessened(weight, values, ctx.places, ctx.scratch)
        if ctx.needs_input_grad[2]:
            bias_gradient = gradient.flatten(0, -2).sum(0)
        if ctx.needs_input_grad[3]:
            values_gradient = ctx.entries.sampled_over_tokens(gradient, inputs, values.dtype).neg_()
        return inputs_gradient, None, bias_gradient, values_gradient, None, None, None


def _lessened(weight: Tensor, values: Tensor, places: Tensor, scratch: Scratch) -> Tensor:
    """Return W − C; valid until the next call for the same shape."""
    key = (weight.shape, weight.device)
    if key not in scratch:
        # Made under inference mode it could not be written to afterwards.
        with torch.inference_mode(False):
            scratch[key] = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    lessened = scratch[key].copy_(weight)
    lessened.view(-1).index_add_(0, places, values, alpha=-1)
    return lessened
