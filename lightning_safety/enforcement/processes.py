# SPDX-License-Identifier: Apache-2.0
"""What processes that train one model together must agree on. Nothing happens where there is one process."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, distributed


def average_over_processes(tensors: Sequence[Tensor]) -> None:
    """Replace tensors that every process holds whole by their means; those spread over processes are means already.

    All that every process computes alike is alike only up to rounding on devices whose sums have no fixed order. Where
    replicas would go apart by that, the mean keeps them together.
    """
    if not _several():
        return
    replicated = [tensor for tensor in tensors if not hasattr(tensor, "to_local")]
    works = [distributed.all_reduce(tensor, async_op=True) for tensor in replicated]
    for tensor, work in zip(replicated, works, strict=True):
        work.wait()
        tensor.div_(distributed.get_world_size())


def failed_anywhere(passed: Sequence[Tensor]) -> list[bool]:
    """Return which of some scalar truths are not true in every process; alike everywhere, so that none waits alone."""
    if not passed:
        return []
    failed = torch.stack([~answer.to(passed[0].device) for answer in passed]).int()
    if _several():
        distributed.all_reduce(failed)
    return [bool(count) for count in failed.tolist()]


def sum_of_products(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Return the inner product of two lists of tensors, each pair's sum in float32, over all shards."""
    if not one:
        return 0.0
    parts = [(a.float() * b.float()).sum() for a, b in zip(one, other, strict=True)]
    # A sum over shards is a DTensor that waits to be added up.
    whole = [part.full_tensor() if hasattr(part, "full_tensor") else part for part in parts]
    return float(torch.stack([part.cpu().double() for part in whole]).sum())


def _several() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
