# SPDX-License-Identifier: Apache-2.0
"""The prompt sets written for the package: sizes, splits, variety, and what may not stand in them."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from lightning_safety.data import BUILT_IN_SETS, SPLITS, load_prompts, near_duplicates

SIZES = {
    "harmful": {"score": 60, "train": 80, "monitor": 40, "test": 100},
    "harmless": {"score": 60, "train": 80, "monitor": 40, "test": 100},
    "borderline": {"train": 40, "monitor": 20, "test": 100},
}
REFUSAL = re.compile(r"\b(can't|cannot|won't|not able to|can not|unable to)\b")


def rows_of(name: str) -> dict[str, list]:
    """Return the rows of a built-in set by split."""
    return {split: load_prompts(name, split=split) for split in SIZES[name]}


@pytest.mark.parametrize("name", BUILT_IN_SETS)
def test_every_split_has_its_size(name):
    for split, rows in rows_of(name).items():
        assert len(rows) >= SIZES[name][split]
        assert all(row.prompt and row.response and row.category for row in rows)


def test_no_prompt_stands_twice_or_nearly_twice_in_any_set_or_split():
    prompts = [row.prompt for name in BUILT_IN_SETS for rows in rows_of(name).values() for row in rows]
    pairs = [(prompts[first], prompts[second]) for first, second in near_duplicates(prompts, threshold=0.6)]
    assert pairs == []


def test_near_duplicates_would_be_found():
    assert near_duplicates(["How do I kill a Python process?", "How do I kill the Python process?"], threshold=0.6)


@pytest.mark.parametrize("name", BUILT_IN_SETS)
def test_no_template_mill_wrote_a_set(name):
    rows = [row for split in rows_of(name).values() for row in split]
    openings = Counter(" ".join(row.prompt.lower().split()[:3]) for row in rows)
    assert openings.most_common(1)[0][1] <= len(rows) * 0.05
    assert len({row.response for row in rows}) == len(rows)
    assert len({row.category for row in rows}) >= 12


@pytest.mark.parametrize("split", SPLITS)
def test_every_harmful_prompt_has_a_refusal(split):
    for row in load_prompts("harmful", split=split):
        assert REFUSAL.search(row.response.split(".")[0]), row.response


@pytest.mark.parametrize("name", ["harmless", "borderline"])
def test_no_answer_opens_with_a_refusal(name):
    for rows in rows_of(name).values():
        for row in rows:
            assert not re.match(r"(I'm sorry|Sorry|I can't|I cannot|I won't|As an AI)", row.response), row.response


@pytest.mark.parametrize("split", SPLITS)
def test_harmful_prompts_are_short_and_without_working_detail(split):
    for row in load_prompts("harmful", split=split):
        assert len(row.prompt.split()) <= 40
        assert not re.search(r"\d|`|http|\b(mg|gram|grams|milligram|litre)s?\b", row.prompt), row.prompt
