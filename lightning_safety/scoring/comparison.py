# SPDX-License-Identifier: Apache-2.0
"""How far different safety objectives rank the same weights first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from scipy import stats
from torch import Tensor

from lightning_safety.scoring.describe import describe_mask, ordered_components, ordered_layers
from lightning_safety.scoring.mask import SafetyMask
from lightning_safety.scoring.shares import GroupShare, align_numbers

_SAMPLE = 1_000_000


def sample_scores(scores: Mapping[str, Tensor], count: int = _SAMPLE, seed: int = 0) -> Tensor:
    """Return the scores of `count` weights drawn at random: the same weights for every score of one model.

    Args:
        scores: As `expected_safety_impact` returns them.
        count: How many; where there are fewer weights, all.
        seed: Of the draw.

    Returns:
        float32 [count], on the CPU.
    """
    total = sum(score.numel() for score in scores.values())
    if count >= total:
        return torch.cat([score.flatten().float().cpu() for score in scores.values()])
    # With replacement: among so many weights, hardly one comes twice.
    places = torch.randint(0, total, (count,), generator=torch.Generator().manual_seed(seed)).sort().values
    parts, start = [], 0
    for score in scores.values():
        first, last = torch.searchsorted(places, torch.tensor([start, start + score.numel()])).tolist()
        parts.append(score.flatten()[(places[first:last] - start).to(score.device)].float().cpu())
        start += score.numel()
    return torch.cat(parts)


def jaccard(first: SafetyMask, second: SafetyMask) -> float:
    """Return the share of the weights in either mask that are in both."""
    common = first.overlap(second)
    return common / (first.count + second.count - common)


def rank_correlation(first: Tensor, second: Tensor) -> float:
    """Return Spearman's rank correlation of two samples of scores of the same weights, over those scored in both."""
    both = ~(first.isnan() | second.isnan())
    return float(stats.spearmanr(first[both].numpy(), second[both].numpy()).statistic)


def objective_comparison(masks: Mapping[str, SafetyMask], samples: Mapping[str, Tensor]) -> str:
    """Return tables: overlap of the masks, rank correlation of the scores, and where the weights of each mask lie.

    Args:
        masks: By objective; of one model. A random mask among them is the control.
        samples: What `sample_scores` returned, by objective; a random mask has none.

    Returns:
        Plain text.
    """
    names = list(masks)
    overlap = [("Jaccard", *names)]
    overlap += [(row, *(f"{jaccard(masks[row], masks[column]):.4f}" for column in names)) for row in names]
    scored = list(samples)
    ranks = [("rank correlation", *scored)]
    ranks += [(row, *(f"{rank_correlation(samples[row], samples[column]):.3f}" for column in scored)) for row in scored]
    described = {name: describe_mask(mask) for name, mask in masks.items()}
    components = {name: found.components for name, found in described.items()}
    layers = {name: found.layers for name, found in described.items()}
    tables = [
        overlap,
        ranks,
        _pattern("enrichment by component", components, ordered_components),
        _pattern("enrichment by layer", layers, ordered_layers),
    ]
    return "\n\n".join("\n".join(align_numbers(table)) for table in tables)


def _pattern(
    heading: str, groups: Mapping[str, Sequence[GroupShare]], order: Callable[[Iterable[str]], list[str]]
) -> list[tuple[str, ...]]:
    found = {name: {group.group: f"{group.enrichment:.2f}" for group in column} for name, column in groups.items()}
    rows = order(dict.fromkeys(group for column in found.values() for group in column))
    return [(heading, *found), *((row, *(column.get(row, "–") for column in found.values())) for row in rows)]
