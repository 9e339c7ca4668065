# SPDX-License-Identifier: Apache-2.0
"""How well a linear classifier tells two sets of vectors apart."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_FOLDS = 5
_RIDGE = 0.1  # of the mean eigenvalue of the training vectors' Gram matrix


class Separability(NamedTuple):
    """What cross-validation found.

    Attributes:
        accuracy: Share of the vectors that were put in the right set by a classifier that had not seen them.
        chance: The larger set's share: what guessing gives. With n vectors, an accuracy within about √(1/n) of it says
            nothing.
    """

    accuracy: float
    chance: float


def linear_separability(first: Tensor, second: Tensor, *, seed: int = 0) -> Separability:
    """Measure by cross-validation how well a linear classifier tells two sets of vectors apart.

    Ridge regression on the targets +1 and −1, solved in the dual, so that more features than vectors are no obstacle.
    The penalty is a tenth of the mean eigenvalue of the training vectors' Gram matrix. Features are not standardised:
    no axis of a residual stream stands for anything, and so the result does not depend on how the axes lie. Five folds,
    fewer for sets of fewer than five vectors, each with the same share of both sets.

    Args:
        first: [n₁, features], floating-point; computed in float64.
        second: [n₂, features].
        seed: Of the folds.

    Raises:
        ValueError: A set has fewer than two vectors, or the sizes differ.

    Example:
        >>> linear_separability(torch.eye(4) + 9, torch.eye(4) - 9)
        Separability(accuracy=1.0, chance=0.5)
    """
    if first.dim() != 2 or second.dim() != 2 or first.shape[1] != second.shape[1] or min(len(first), len(second)) < 2:
        raise ValueError(
            "Two sets of at least two vectors each, of one size, expected but got the shapes "
            f"{tuple(first.shape)} and {tuple(second.shape)}."
        )
    sizes = len(first), len(second)
    vectors = torch.cat([first, second]).double()
    targets = torch.cat([vectors.new_ones(sizes[0]), -vectors.new_ones(sizes[1])])
    generator = torch.Generator().manual_seed(seed)
    count = min(_FOLDS, *sizes)
    folds = torch.cat([torch.randperm(size, generator=generator) % count for size in sizes]).to(vectors.device)
    right = 0
    for fold in range(count):
        held_out = folds == fold
        predicted = _predict(vectors[~held_out], targets[~held_out], vectors[held_out])
        # Where nothing tells the sets apart all go to one of them: chance, not 0.
        right += int(((predicted >= 0) == (targets[held_out] > 0)).sum())
    return Separability(right / sum(sizes), max(sizes) / sum(sizes))


def _predict(vectors: Tensor, targets: Tensor, others: Tensor) -> Tensor:
    """Return the ridge regression's values for `others`; above 0 is the first set."""
    mean = vectors.mean(dim=0)
    known, unknown = vectors - mean, others - mean
    gram = known @ known.T
    penalty = _RIDGE * float(gram.diagonal().mean()) or 1.0
    offset = targets.mean()
    weights = torch.linalg.solve(gram + penalty * torch.eye(len(gram)).to(gram), targets - offset)
    values: Tensor = unknown @ (known.T @ weights) + offset
    return values
