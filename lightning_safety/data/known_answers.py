# SPDX-License-Identifier: Apache-2.0
"""Small tasks with one right answer, generated: a measure of usefulness that needs neither a benchmark nor a judge."""

from __future__ import annotations

import itertools
import math
import random

from lightning_safety.arguments import check_positive
from lightning_safety.data.prompts import Example

_WORDS = (
    "apple", "basket", "candle", "dragon", "engine", "forest", "garden", "hammer", "island", "jacket",
    "kitchen", "lemon", "mirror", "needle", "orange", "pencil", "river", "silver", "tunnel", "window",
)  # fmt: skip
_LARGEST = 9
MOST_TASKS = 3 * len(_WORDS)
"""Of one seed, differing."""


def known_answer_tasks(count: int = 60, *, seed: int = 0) -> list[Example]:
    """Return tasks of arithmetic and of strings, in turn, each with its answer as the response.

    They are what a model of a hundred million parameters gets right about every second time: sums and products of
    numbers up to nine, and first letters.

    Args:
        count: How many, at most 60: so many differ.
        seed: Of the numbers and words.

    Raises:
        ValueError: `count` is out of range.

    Example:
        >>> [(task.prompt, task.response) for task in known_answer_tasks(2)]
        [('What is 8 + 3?', '11'), ('What is the first letter of the word "needle"?', 'n')]
    """
    check_positive(count, "count")
    if count > MOST_TASKS:
        raise ValueError(f"`count` expected to be at most {MOST_TASKS}, as many as differ, but got {count}.")
    drawn = random.Random(seed)
    pairs = list(itertools.product(range(2, _LARGEST + 1), repeat=2))
    sums, products = (drawn.sample(pairs, MOST_TASKS // 3) for _ in range(2))
    tasks = []
    for added, word, multiplied in zip(sums, drawn.sample(_WORDS, MOST_TASKS // 3), products, strict=True):
        tasks += [
            Example(f"What is {added[0]} + {added[1]}?", str(sum(added))),
            Example(f'What is the first letter of the word "{word}"?', word[0]),
            Example(f"What is {multiplied[0]} * {multiplied[1]}?", str(math.prod(multiplied))),
        ]
    return tasks[:count]
