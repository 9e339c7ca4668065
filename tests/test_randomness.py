# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import io
import random

import numpy as np
import torch

from lightning_safety.randomness import capture_random_state, preserved_random_state, restore_random_state


def draw() -> tuple[float, float, float, float]:
    """Draw from every generator; `gauss` and `standard_normal` keep a second value for the next call."""
    return random.gauss(0, 1), random.random(), float(np.random.standard_normal()), float(torch.rand(()))


def test_a_restored_state_draws_the_same_again():
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    draw()
    state = capture_random_state()
    expected = [draw() for _ in range(3)]
    restore_random_state(state)
    assert [draw() for _ in range(3)] == expected


def test_the_state_survives_a_checkpoint():
    buffer = io.BytesIO()
    torch.save(capture_random_state(), buffer)
    expected = draw()
    buffer.seek(0)
    restore_random_state(torch.load(buffer, weights_only=True))
    assert draw() == expected


def test_nothing_drawn_inside_is_seen_outside():
    state = capture_random_state()
    expected = draw()
    restore_random_state(state)
    with preserved_random_state():
        draw()
        torch.manual_seed(5)
    assert draw() == expected
