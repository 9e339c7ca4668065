# SPDX-License-Identifier: Apache-2.0
"""Tasks with one right answer: differing, in turn, and right."""

from __future__ import annotations

import re

import pytest

from lightning_safety.data import known_answer_tasks
from lightning_safety.data.known_answers import MOST_TASKS


def test_answers_are_right_and_tasks_differ():
    tasks = known_answer_tasks(MOST_TASKS, seed=3)
    assert len({task.prompt for task in tasks}) == MOST_TASKS
    kinds = []
    for task in tasks:
        numbers = [int(number) for number in re.findall(r"\d+", task.prompt)]
        if "+" in task.prompt or "*" in task.prompt:
            kinds.append(task.prompt.split()[3])
            expected = sum(numbers) if "+" in task.prompt else numbers[0] * numbers[1]
            assert task.response == str(expected)
        else:
            kinds.append("letter")
            assert task.response == re.search('"(.)', task.prompt)[1]
    assert kinds[:3] == ["+", "letter", "*"]
    assert {kinds.count(kind) for kind in kinds} == {MOST_TASKS // 3}


def test_another_seed_gives_other_tasks_and_the_same_seed_the_same():
    assert known_answer_tasks(9) == known_answer_tasks(9)
    assert known_answer_tasks(9) != known_answer_tasks(9, seed=1)


@pytest.mark.parametrize("count", [0, MOST_TASKS + 1])
def test_counts_out_of_range_are_refused(count):
    with pytest.raises(ValueError, match="`count` expected to be at"):
        known_answer_tasks(count)
