# SPDX-License-Identifier: Apache-2.0
"""Whether losses and gradients are finite, asked fast."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor


def has_finite_norm(tensor: Tensor) -> Tensor:
    """Return whether the norm of a tensor is finite: a scalar truth, on its device.

    If it is, all entries are; if it is not, the squares of large ones may have overflowed, and `is_finite` tells. On a
    CPU this takes less than a tenth of the time.
    """
    norm: Tensor = torch.linalg.vector_norm(tensor)
    return norm.isfinite()


def is_finite(tensor: Tensor) -> Tensor:
    """Return whether all entries of a tensor are finite: a scalar truth, on its device."""
    return tensor.isfinite().all()


def check_loss(loss: Tensor, place: str) -> None:
    """Refuse a loss that is not finite, by a RuntimeError; `place` says of which batch."""
    value = float(loss.detach())
    if not math.isfinite(value):
        raise RuntimeError(
            f"The loss of `objective` is {value:g} in {place}. Check the model's weights and its dtype: float16"
            " often overflows, bfloat16 and float32 do not."
        )


def check_gradients(finite: Mapping[str, Tensor], sums: Mapping[str, Tensor], loss: Tensor, place: str) -> None:
    """Refuse a batch after which a sum is not finite, by a RuntimeError. One question to the device for all norms.

    Args:
        finite: By name, what `has_finite_norm` says of the sums that the batch reached.
        sums: By name.
        loss: Of the batch.
        place: Which batch it is.
    """
    answers = torch.stack([answer.to(loss.device) for answer in finite.values()]).tolist() if finite else []
    for name, answer in zip(finite, answers, strict=True):
        if not answer and not is_finite(sums[name]):
            raise RuntimeError(
                f"The gradient of `{name}` is not finite in {place}, although the loss is {float(loss.detach()):g}."
                " Score the model in float32 or bfloat16."
            )
