# SPDX-License-Identifier: Apache-2.0
"""Where the weights of highest score lie, by component and by layer, and how far that depends on the prompts."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lightning_safety.arguments import check_fraction, check_positive
from lightning_safety.data import load_prompts
from lightning_safety.language import load_causal_lm, load_tokenizer
from lightning_safety.report.studies.pattern import write_pattern
from lightning_safety.scoring import RefusalMargin, SafetyMask, expected_safety_impact, select_top
from lightning_safety.scoring.comparison import jaccard
from lightning_safety.scoring.shares import GroupShare
from lightning_safety.training.studies.cells import Cell, describe_rows, describe_source, run_study_cells

_SECONDS_A_SCORING = 20.0


def pattern(
    models: dict[str, str],
    *,
    fraction: float = 0.01,
    resamples: int = 20,
    limit: int | None = None,
    seed: int = 0,
    only: list[str] | None = None,
    hours: float | None = 6.0,
    output: Path = Path("results/pattern"),
) -> None:
    """Score models, select the highest, and compare where they lie with the size of each component and layer.

    The pattern of arXiv 2604.08297, with intervals: enrichment is taken again from prompts drawn with replacement
    (bootstrap). Scores are `RefusalMargin`'s on ``harmful/score``.

    Args:
        models: By name: a hub id, a folder or a GGUF file.
        fraction: Of the scored weights, in (0, 1].
        resamples: How many times prompts are drawn; each takes another scoring.
        limit: At most so many prompts. None: all.
        seed: Of the draws.
        only: Run these models only. None: run all.
        hours: Start no cell that is expected to end later than so many hours from now. None, ``--full``: run all.
        output: Folder of the results. Cells whose file is there are not run again.

    Raises:
        ValueError: An argument is out of range, or `output` holds cells of other settings.
        RuntimeError: Some cells failed; the others were run, and are in the results.
    """
    check_fraction(fraction)
    check_positive(resamples, "resamples")
    shared = {
        "prompts": describe_rows(load_prompts("harmful", split="score")[:limit]),
        "fraction": fraction,
        "resamples": resamples,
        "seed": seed,
    }
    estimate = _SECONDS_A_SCORING * (1 + resamples)
    cells = [
        Cell(
            name,
            estimate,
            partial(_measure, source, fraction, resamples, limit, seed),
            {"source": describe_source(source), **shared},
        )
        for name, source in models.items()
    ]
    run_study_cells(cells, write_pattern, output=output, shared=shared, hours=hours, only=only)


def _measure(source: str, fraction: float, resamples: int, limit: int | None, seed: int) -> dict[str, Any]:
    model, tokenizer = load_causal_lm(source, dtype="float32"), load_tokenizer(source)
    prompts = load_prompts("harmful", split="score")[:limit]

    def mask(examples: Sequence[Any]) -> SafetyMask:
        return select_top(expected_safety_impact(model, RefusalMargin(list(examples)), tokenizer), fraction)

    whole = mask(prompts)
    drawn = random.Random(seed)
    masks = [mask(drawn.choices(prompts, k=len(prompts))) for _ in range(resamples)]
    described = [one.describe() for one in masks]
    found = whole.describe()
    return {
        "prompts": len(prompts),
        "scored": whole.scored,
        "selected": whole.count,
        "components": _groups(found.components, [one.components for one in described]),
        "layers": _groups(found.layers, [one.layers for one in described]),
        "jaccard": [jaccard(whole, one) for one in masks],
    }


def _groups(groups: Sequence[GroupShare], resampled: Sequence[Sequence[GroupShare]]) -> list[dict[str, Any]]:
    """Return what is known of each group, and its enrichment in each resample."""
    return [
        {
            "group": group.group,
            "weights": group.weights,
            "selected": group.selected,
            "enrichment": group.enrichment,
            "resampled": [groups[number].enrichment for groups in resampled],
        }
        for number, group in enumerate(groups)
    ]
