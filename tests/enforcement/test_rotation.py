# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from lightning_safety.enforcement.rotation import Rotation
from lightning_safety.scoring import ObjectiveBatch

BATCHES = [ObjectiveBatch({}, examples) for examples in range(1, 8)]


def test_every_round_has_each_batch_once_and_an_order_of_its_own() -> None:
    rotation = Rotation(BATCHES, seed=3)
    rounds = [[rotation[number * 7 + place].examples for place in range(7)] for number in range(4)]
    assert all(sorted(found) == list(range(1, 8)) for found in rounds)
    assert len({tuple(found) for found in rounds}) == 4


def test_a_position_has_the_same_batch_wherever_the_reading_began() -> None:
    forward = [Rotation(BATCHES, seed=3)[position].examples for position in range(21)]
    rotation = Rotation(BATCHES, seed=3)
    assert [rotation[position].examples for position in reversed(range(21))] == forward[::-1]
    assert [Rotation(BATCHES, seed=4)[position].examples for position in range(21)] != forward
