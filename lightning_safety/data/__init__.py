# SPDX-License-Identifier: Apache-2.0
"""Prompt sets, and how examples become batches. Needs neither transformers nor Lightning."""

from __future__ import annotations

from lightning_safety.data.collator import IGNORED_LABEL, TokenizedExample, length_buckets, pad_batch
from lightning_safety.data.known_answers import known_answer_tasks
from lightning_safety.data.overlap import drop_overlapping, near_duplicates, word_jaccard
from lightning_safety.data.prompts import BUILT_IN_SETS, SPLITS, Example, load_prompts

__all__ = [
    "BUILT_IN_SETS",
    "IGNORED_LABEL",
    "SPLITS",
    "Example",
    "TokenizedExample",
    "drop_overlapping",
    "known_answer_tasks",
    "length_buckets",
    "load_prompts",
    "near_duplicates",
    "pad_batch",
    "word_jaccard",
]
