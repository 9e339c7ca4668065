# SPDX-License-Identifier: Apache-2.0
"""Shapes and flat indices of a mask: checks, their dtype, and which are among others."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def checked_shape(name: str, shape: object) -> tuple[int, ...]:
    """Return `shape` as a tuple of plain integers whose product an int64 can index."""
    entries = tuple(shape) if isinstance(shape, list | tuple) else None
    if entries is None or any(isinstance(size, bool) or not isinstance(size, int) or size < 0 for size in entries):
        raise ValueError(f"Shape of `{name}` expected to be integers of at least 0 but got {shape!r:.80}.")
    if math.prod(entries) >= 2**63:
        raise ValueError(f"Shape of `{name}` expected to have fewer than 2^63 entries but got {shape!r:.80}.")
    return entries


def checked_index(name: str, index: object, shape: tuple[int, ...]) -> Tensor:
    """Return `index` on the CPU in its canonical dtype, or say what is wrong with it."""
    if not isinstance(index, Tensor) or index.dtype not in (torch.int32, torch.int64) or index.dim() != 1:
        found = f"a {index.dim()}-D {index.dtype} tensor" if isinstance(index, Tensor) else type(index).__name__
        raise TypeError(f"Indices of `{name}` expected to be a 1-D int32 or int64 tensor but got {found}.")
    index = index.detach().cpu()
    entries = math.prod(shape)
    if index.numel():
        if bool((index[1:] <= index[:-1]).any()):
            raise ValueError(f"Indices of `{name}` expected to be sorted without duplicates but they are not.")
        first, last = int(index[0]), int(index[-1])
        if first < 0 or last >= entries:
            outside = first if first < 0 else last
            raise ValueError(
                f"Indices of `{name}` expected to be in [0, {entries}) for shape {list(shape)} but got {outside}."
            )
    return index.to(index_dtype(entries)).contiguous()


def index_dtype(entries: int) -> torch.dtype:
    """Return the dtype of flat indices into a tensor of so many entries.

    Example:
        >>> index_dtype(2**31 - 1), index_dtype(2**31)
        (torch.int32, torch.int64)
    """
    return torch.int32 if entries <= torch.iinfo(torch.int32).max else torch.int64


def contained(values: Tensor, among: Tensor) -> Tensor:
    """Return for each of `values` whether it occurs in `among`; both sorted. Shape [values], bool."""
    if not among.numel():
        return torch.zeros(values.shape, dtype=torch.bool)
    place = torch.searchsorted(among, values).clamp_(max=among.numel() - 1)
    return among[place] == values
