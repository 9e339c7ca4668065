# SPDX-License-Identifier: Apache-2.0
"""Near-duplicates: equal to comparing every pair."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_safety.data import Example, drop_overlapping, near_duplicates, word_jaccard

TEXTS = st.lists(st.lists(st.sampled_from(list("abcdefgh")), max_size=6).map(" ".join), max_size=12)
THRESHOLDS = st.sampled_from([0.1, 0.2, 0.25, 0.3, 1 / 3, 0.4, 0.5, 0.6, 2 / 3, 0.7, 0.75, 0.8, 0.9, 1.0])


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ("How do I bake bread?", "how do I bake  BREAD", 1.0),
        ("a b c", "b c d", 0.5),
        ("a a a b", "b a", 1.0),
        ("don't", "don’t stop", 0.0),
        ("snake_case", "snake case", 1.0),
        ("a", "b", 0.0),
        ("a", "?!", 0.0),
        ("?!", "", 1.0),
        ("Straße", "STRASSE", 1.0),
    ],
)
def test_word_jaccard(a, b, expected):
    assert word_jaccard(a, b) == word_jaccard(b, a) == expected


@given(texts=TEXTS, threshold=THRESHOLDS)
def test_near_duplicates_are_all_pairs_that_reach_the_threshold(texts, threshold):
    expected = [
        (first, second)
        for first, second in combinations(range(len(texts)), 2)
        if word_jaccard(texts[first], texts[second]) >= threshold
    ]
    assert near_duplicates(texts, threshold) == expected


@given(texts=TEXTS, reference=TEXTS, threshold=THRESHOLDS)
def test_dropped_are_those_that_reach_the_threshold_with_any_reference(texts, reference, threshold):
    examples = [Example(text) for text in texts]
    expected = [
        example for example in examples if all(word_jaccard(example.prompt, other) < threshold for other in reference)
    ]
    others = [Example(text) if index % 2 else text for index, text in enumerate(reference)]
    assert drop_overlapping(examples, others, threshold) == (expected, len(examples) - len(expected))


@pytest.mark.parametrize("threshold", [0, 1.5])
def test_a_threshold_is_a_fraction(threshold):
    with pytest.raises(ValueError, match="`threshold` expected to be in"):
        near_duplicates(["a"], threshold)
