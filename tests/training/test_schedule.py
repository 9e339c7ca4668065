# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import pytest

from lightning_safety.training.schedule import SCHEDULES, make_schedule


@pytest.mark.parametrize("name", SCHEDULES)
def test_warm_up_rises_in_equal_parts_and_reaches_one_when_it_ends(name: str) -> None:
    schedule = make_schedule(name, warmup_steps=4, total_steps=20)
    assert [schedule(step) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_decay_starts_at_one_and_ends_at_zero_after_the_last_step(name: str) -> None:
    schedule = make_schedule(name, warmup_steps=0, total_steps=10)
    values = [schedule(step) for step in range(12)]
    assert values[0] == 1
    assert values[5] == pytest.approx(0.5)
    assert values[9] > 0
    assert values[10:] == [0, 0]
    assert values == sorted(values, reverse=True)


def test_constant_needs_no_end() -> None:
    assert make_schedule("constant", warmup_steps=0, total_steps=math.inf)(10**9) == 1
