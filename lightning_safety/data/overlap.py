# SPDX-License-Identifier: Apache-2.0
"""Finding prompts that are nearly the same, so that what is trained on is never what is tested on."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from lightning_safety.arguments import check_fraction
from lightning_safety.data.prompts import Example

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")


def word_jaccard(a: str, b: str) -> float:
    """Return how many of the words in either text are in both, from 0 to 1.

    Words are compared without case, order, repetition and punctuation. Two texts without words count as equal.

    Example:
        >>> word_jaccard("How do I bake bread?", "how do i bake rye bread")
        0.8333333333333334
    """
    return _jaccard(_words(a), _words(b))


def near_duplicates(prompts: Sequence[str], threshold: float) -> list[tuple[int, int]]:
    """Return every pair of prompts whose `word_jaccard` is at least `threshold`.

    Args:
        prompts: The texts.
        threshold: In (0, 1].

    Returns:
        Pairs of indices (smaller, larger), sorted.

    Example:
        >>> near_duplicates(["Bake bread", "Boil an egg", "bake BREAD!"], threshold=0.6)
        [(0, 2)]
    """
    sets = [_words(prompt) for prompt in prompts]
    pairs = _similar_pairs(sets, sets, check_fraction(threshold, "threshold"))
    return sorted((first, second) for first, second in pairs if first < second)


def drop_overlapping(
    examples: Sequence[Example], reference: Iterable[Example | str], threshold: float = 0.6
) -> tuple[list[Example], int]:
    """Drop the examples whose prompt is close to one of the reference prompts.

    Args:
        examples: What to filter.
        reference: The prompts that must not occur in it.
        threshold: An example is dropped if its `word_jaccard` with any of them is at least this, in (0, 1].

    Returns:
        The examples kept, in order, and the number dropped.

    Example:
        >>> drop_overlapping([Example("Bake rye bread"), Example("Boil an egg")], ["bake bread"])
        ([Example(prompt='Boil an egg', response=None, category=None)], 1)
    """
    candidates = [_words(example.prompt) for example in examples]
    others = [_words(other if isinstance(other, str) else other.prompt) for other in reference]
    found = {first for first, _ in _similar_pairs(candidates, others, check_fraction(threshold, "threshold"))}
    return [example for index, example in enumerate(examples) if index not in found], len(found)


def _words(text: str) -> frozenset[str]:
    return frozenset(_WORD.findall(text.casefold()))


def _jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    shared = len(a & b)
    union = len(a) + len(b) - shared
    return shared / union if union else 1.0


def _similar_pairs(
    left: Sequence[frozenset[str]], right: Sequence[frozenset[str]], threshold: float
) -> set[tuple[int, int]]:
    """Return all (index in left, index in right) that reach the threshold, without comparing every pair.

    Two sets that reach it share at least ⌈threshold · size⌉ words of either, so with all words in one order their first
    size − ⌈threshold · size⌉ + 1 words must meet. Rare words first keeps the meetings few.
    """
    frequency = Counter(word for words in (*left, *right) for word in words)

    def prefix(words: frozenset[str]) -> list[str]:
        if not words:
            return [""]
        # The small amount guards against 0.6 · 5 = 3.0000000000000004.
        needed = math.ceil(threshold * len(words) - 1e-9)
        return sorted(words, key=lambda word: (frequency[word], word))[: len(words) - needed + 1]

    places: dict[str, list[int]] = defaultdict(list)
    for index, words in enumerate(right):
        for word in prefix(words):
            places[word].append(index)
    meetings = {
        (first, second) for first, words in enumerate(left) for word in prefix(words) for second in places[word]
    }
    return {(first, second) for first, second in meetings if _jaccard(left[first], right[second]) >= threshold}
