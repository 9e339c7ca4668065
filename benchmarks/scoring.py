# SPDX-License-Identifier: Apache-2.0
"""What scoring the weights of SmolLM2-135M-Instruct takes beside plain forward and backward passes.

python benchmarks/scoring.py [--json FILE] [--quick]

`expected_safety_impact` with `RefusalMargin()` on the first built-in prompts for scoring, in float32. Each prompt has
two rows: with its refusal, and with a willing opening. "Plain" passes are the model's own forward pass with labels and
a backward pass over the same tokens: one row at a time without padding, or in the batches that scoring has, padded.
They compute all logits and the gradients of all weights; scoring computes what all rows begin with once, and logits
where there are labels.

How far scores differ is the largest difference of a tensor's scores from those in batches of 8, relative to their norm,
and the Jaccard index of the masks of the top 1 %, beside that of a random mask.

`--quick` takes a tiny model and few prompts to show that the script works; its numbers mean nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from side_by_side import parse_arguments, print_table, print_times, summary, take_turns, write_json
from torch import Tensor
from training_step import FRACTION, SEED, load_model

from lightning_safety.language import BUNDLED_MODEL, load_tokenizer
from lightning_safety.scoring import RefusalMargin, SafetyMask, expected_safety_impact, select_random, select_top
from lightning_safety.scoring.objective import ObjectiveBatch

ROUNDS, PROMPTS, BATCH_SIZE = 7, 24, 8
# By name, what `expected_safety_impact` is called with: a way to score is added here.
REFERENCE = "scoring, batches of 8"
SCORINGS: dict[str, dict[str, Any]] = {
    REFERENCE: {"batch_size": BATCH_SIZE},
    "scoring, one prompt at a time": {"batch_size": 1},
}
UNPADDED, PADDED = "plain passes, unpadded rows", "plain passes, padded batches"
Scores = dict[str, Tensor]


def plain_unpadded(model: Any, batches: Sequence[ObjectiveBatch]) -> None:
    """Pass forward and backward over every row by itself."""
    for batch in batches:
        for tokens, attention, labels in zip(
            *(batch.tensors[name] for name in ("input_ids", "attention_mask", "labels")), strict=True
        ):
            real = attention.bool()
            row = {"input_ids": tokens[real].unsqueeze(0), "labels": labels[real].unsqueeze(0)}
            model(**row, use_cache=False).loss.backward()
    model.zero_grad()


def plain_padded(model: Any, batches: Sequence[ObjectiveBatch]) -> None:
    """Pass forward and backward over the batches as they are."""
    for batch in batches:
        model(**batch.tensors, use_cache=False).loss.backward()
    model.zero_grad()


class Scoring:
    """All ways to score one model, and the scores that each gave last."""

    def __init__(self, model: Any, objective: RefusalMargin) -> None:
        self.model, self.objective, self.tokenizer = model, objective, load_tokenizer(BUNDLED_MODEL)
        self.scores: dict[str, Scores] = {}

    def score(self, way: str) -> None:
        """Score by it."""
        self.scores.pop(way, None)
        self.scores[way] = expected_safety_impact(
            self.model, self.objective, self.tokenizer, show_progress=False, **SCORINGS[way]
        )

    def ways(self) -> dict[str, Callable[[], object]]:
        """Return what to time, by name."""
        batches = self.objective.batches(self.tokenizer, batch_size=BATCH_SIZE)
        return {
            UNPADDED: partial(plain_unpadded, self.model, batches),
            PADDED: partial(plain_padded, self.model, batches),
            **{way: partial(self.score, way) for way in SCORINGS},
        }

    def agreement(self) -> dict[str, dict[str, float | None]]:
        """Return, by way, the largest relative difference of a tensor and the Jaccard index of masks."""
        reference = self.scores[REFERENCE]
        mask = select_top(reference, FRACTION)
        found: dict[str, dict[str, float | None]] = {
            way: {
                "largest_difference": max(
                    float((score - reference[name]).norm() / reference[name].norm()) for name, score in scores.items()
                ),
                "jaccard": jaccard(select_top(scores, FRACTION), mask),
            }
            for way, scores in self.scores.items()
            if way != REFERENCE
        }
        random = select_random(reference, FRACTION, SEED)
        return {**found, "random mask": {"largest_difference": None, "jaccard": jaccard(random, mask)}}


def jaccard(mask: SafetyMask, other: SafetyMask) -> float:
    """Return in how much of their union two masks agree."""
    common = mask.overlap(other)
    return common / (mask.count + other.count - common)


def count_tokens(batches: Sequence[ObjectiveBatch]) -> dict[str, int]:
    """Return how many rows and tokens there are, without padding and with it."""
    attention = [batch.tensors["attention_mask"] for batch in batches]
    return {
        "rows": sum(len(mask) for mask in attention),
        "tokens": sum(int(mask.sum()) for mask in attention),
        "padded_tokens": sum(mask.numel() for mask in attention),
    }


def main() -> None:
    """Print the tables."""
    arguments = parse_arguments(__doc__)
    rounds, prompts = (1, 3) if arguments.quick else (ROUNDS, PROMPTS)
    model = load_model(quick=arguments.quick).eval()
    scoring = Scoring(model, RefusalMargin(limit=prompts))
    counts = count_tokens(scoring.objective.batches(scoring.tokenizer, batch_size=BATCH_SIZE))
    print(
        f"{prompts} prompts: {counts['rows']} rows, {counts['tokens']:,} tokens without padding,"
        f" {counts['padded_tokens']:,} with it in batches of {BATCH_SIZE} prompts.\n"
    )
    warm_up = Scoring(model, RefusalMargin(limit=1)).ways()
    for run in warm_up.values():
        run()
    times = take_turns(scoring.ways(), rounds=rounds)
    print_times(times, unit="seconds", against=UNPADDED)
    agreement = scoring.agreement()
    print_table(
        ["", f"largest difference from {REFERENCE}", "Jaccard index of the masks"],
        [
            [
                way,
                "–" if found["largest_difference"] is None else f"{found['largest_difference']:.1e}",
                f"{found['jaccard']:.4f}",
            ]
            for way, found in agreement.items()
        ],
    )
    write_json(
        arguments,
        settings={
            "prompts": prompts,
            "batch_size": BATCH_SIZE,
            **counts,
            "fraction_of_scored": FRACTION,
            "dtype": str(torch.float32),
        },
        times=summary(times, against=UNPADDED),
        agreement=agreement,
    )


if __name__ == "__main__":
    main()
