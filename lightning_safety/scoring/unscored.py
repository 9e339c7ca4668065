# SPDX-License-Identifier: Apache-2.0
"""How many weights of each tensor were not scored: found in scores, and kept in the metadata of a mask."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

UNSCORED = "unscored"
"""The key in the metadata of a mask."""

_BLOCK_ENTRIES = 2**20
_EXPLAINED = "For each tensor with weights that were not scored it says how many, in one of three dimensions by slice."

Unscored = dict[str, dict[int, int]]
"""By tensor, then by slice along the first of three dimensions (0 where there are fewer), how many were not scored."""


def count_unscored(scores: Mapping[str, Tensor]) -> Unscored:
    """Count the scores that are NaN, without a copy as large as a tensor.

    Args:
        scores: Floating-point scores; on the meta device none is NaN.
    """
    found = {}
    for name, score in scores.items():
        # The sum is NaN if any score is, and needs no copy.
        if score.is_meta or not score.is_floating_point() or not bool(score.detach().sum().isnan()):
            continue
        parts = score.detach() if score.dim() == 3 else [score.detach()]
        counts = [_count(part) for part in parts]
        if any(counts):
            found[name] = {number: count for number, count in enumerate(counts) if count}
    return found


def write_unscored(unscored: Unscored, shapes: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """Return the entry for the metadata of a mask; none where all weights were scored.

    Example:
        >>> write_unscored({"experts": {1: 4}, "head": {0: 2}}, {"experts": (2, 2, 2), "head": (2,)})
        {'unscored': '{"experts": {"1": 4}, "head": 2}'}
    """
    if not unscored:
        return {}
    entries = {name: counts if len(shapes[name]) == 3 else counts[0] for name, counts in unscored.items()}
    return {UNSCORED: json.dumps(entries)}


def read_unscored(metadata: Mapping[str, str], shapes: Mapping[str, Sequence[int]]) -> Unscored:
    """Return what the metadata of a mask says.

    Raises:
        ValueError: It does not fit the shapes.
    """
    if UNSCORED not in metadata:
        return {}
    try:
        entries = json.loads(metadata[UNSCORED])
        return {str(name): _read_entry(counts, shapes[name]) for name, counts in entries.items()}
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(
            f"`metadata` expected to count unscored weights of the mask's tensors under {UNSCORED!r} but got"
            f" {metadata[UNSCORED]!r:.80} ({error}). {_EXPLAINED} Leave it out where all were."
        ) from None


def common_unscored(first: Unscored, second: Unscored) -> Unscored:
    """Return what two masks agree on: a weight counts as scored where either of them scored it."""
    found = {
        name: {number: count for number, count in counts.items() if second.get(name, {}).get(number) == count}
        for name, counts in first.items()
    }
    return {name: counts for name, counts in found.items() if counts}


def _count(score: Tensor) -> int:
    return sum(int(block.isnan().sum()) for block in torch.split(score.reshape(-1), _BLOCK_ENTRIES))


def _read_entry(counts: object, shape: Sequence[int]) -> dict[int, int]:
    slices = shape[0] if len(shape) == 3 else 1
    numbered = {int(number): count for number, count in counts.items()} if isinstance(counts, dict) else {0: counts}
    if isinstance(counts, dict) != (len(shape) == 3):
        raise ValueError(f"not for the shape {list(shape)}")
    for number, count in numbered.items():
        if not isinstance(count, int) or not 0 <= number < slices or not 0 < count <= math.prod(shape) // slices:
            raise ValueError(f"{count!r} in slice {number} of {list(shape)}")
    return {number: count for number, count in numbered.items() if isinstance(count, int)}
