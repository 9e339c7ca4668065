# SPDX-License-Identifier: Apache-2.0
"""Objectives compared by the weights they choose."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_safety.scoring import select_top
from lightning_safety.scoring.comparison import jaccard, objective_comparison, rank_correlation, sample_scores

NAMES = ("layers.0.q_proj.weight", "layers.1.v_proj.weight")


def make_scores(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(20, 30 + number, generator=generator) for number, name in enumerate(NAMES)}


def test_a_sample_takes_the_same_weights_of_every_score() -> None:
    scores = make_scores(0)
    doubled = {name: 2 * score for name, score in scores.items()}
    first, second = sample_scores(scores, 100), sample_scores(doubled, 100)
    assert torch.equal(2 * first, second)
    assert first.shape == (100,)
    assert not torch.equal(first, sample_scores(scores, 100, seed=1))
    values = torch.cat([score.flatten() for score in scores.values()])
    assert torch.isin(first, values).all()
    # From both tensors, by their size.
    assert 30 < torch.isin(first, scores[NAMES[0]]).sum() < 70
    assert torch.equal(sample_scores(scores, 10**6), values)


def test_jaccard() -> None:
    first = {NAMES[0]: torch.tensor([[4.0, 3.0, 2.0, 1.0]])}
    second = {NAMES[0]: torch.tensor([[1.0, 3.0, 4.0, 2.0]])}
    one, two = select_top(first, 0.5), select_top(second, 0.5)
    assert jaccard(one, one) == 1
    assert jaccard(one, two) == pytest.approx(1 / 3)


def test_rank_correlation() -> None:
    values = torch.rand(50)
    assert rank_correlation(values, values**3) == pytest.approx(1)
    assert rank_correlation(values, -values) == pytest.approx(-1)


def test_tables() -> None:
    scores = {"margin": make_scores(0), "guard": make_scores(1)}
    masks = {name: select_top(score, 0.1) for name, score in scores.items()}
    samples = {name: sample_scores(score) for name, score in scores.items()}
    table = objective_comparison({**masks, "random": masks["guard"]}, samples)
    overlap, ranks, components, layers = table.split("\n\n")
    assert overlap.splitlines()[0].split() == ["Jaccard", "margin", "guard", "random"]
    assert overlap.splitlines()[2].split()[2:] == ["1.0000", "1.0000"]
    assert ranks.splitlines()[1].split()[:2] == ["margin", "1.000"]
    assert [line.split()[0] for line in components.splitlines()[1:]] == ["q", "v"]
    assert [line.split()[0] for line in layers.splitlines()[1:]] == ["0", "1"]
    assert layers.splitlines()[0].split()[-3:] == ["margin", "guard", "random"]
