# SPDX-License-Identifier: Apache-2.0
"""The order in which the examples of an objective come round."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lightning_safety.scoring.objective import ObjectiveBatch


class Rotation:
    """Endless batches: every round has each of them once, in an order of its own.

    The batch at a position follows from the seed alone, so that the position is all that a resumed fit needs.

    Args:
        batches: At least one.
        seed: Of the order.

    Example:
        >>> batches = [ObjectiveBatch({}, examples) for examples in (1, 2, 3)]
        >>> rotation = Rotation(batches, seed=0)
        >>> [rotation[position].examples for position in range(6)]
        [3, 1, 2, 3, 2, 1]
    """

    def __init__(self, batches: Sequence[ObjectiveBatch], seed: int) -> None:
        self._batches = list(batches)
        self._seed = seed
        self._round = -1
        self._order: list[int] = []

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, position: int) -> ObjectiveBatch:
        number, place = divmod(position, len(self._batches))
        if number != self._round:
            generator = torch.Generator().manual_seed(self._seed)
            # Rounds are few; drawing the orders of those before costs less than mixing two numbers into one seed.
            for _ in range(number + 1):
                self._order = torch.randperm(len(self._batches), generator=generator).tolist()
            self._round = number
        return self._batches[self._order[place]]
