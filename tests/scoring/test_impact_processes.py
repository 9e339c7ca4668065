# SPDX-License-Identifier: Apache-2.0
"""Scores of several processes that share out the examples are those of one."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

from lightning_safety.scoring import (
    ObjectiveBatch,
    RefusalMargin,
    SafetyMask,
    SafetyObjective,
    expected_safety_impact,
    select_top,
)
from lightning_safety.scoring.impact import Reduction
from tests.spawned import run_although_one_dies, run_in_processes
from tests.tiny import make_tiny_model, make_tiny_tokenizer

# Of seven examples in batches of two, one process gets two batches and the other two, one of them half full.
EXAMPLES = 7


def score(
    objective: SafetyObjective, reduction: Reduction = "signed", *, shared: bool, **lean: Any
) -> dict[str, Tensor]:
    return expected_safety_impact(
        make_tiny_model(),
        objective,
        make_tiny_tokenizer(),
        batch_size=2,
        reduction=reduction,
        shared=shared,
        **lean,
    )


@pytest.mark.parametrize("reduction", ["signed", "absolute"])
def test_scores_are_those_of_one_process(tmp_path: Path, reduction: Reduction) -> None:
    objective = RefusalMargin(limit=EXAMPLES)
    first, second = run_in_processes(tmp_path, partial(score, objective, reduction, shared=True))
    alone = score(objective, reduction, shared=False)
    assert list(first) == list(alone)
    for name, scores in alone.items():
        assert torch.equal(first[name], second[name]), name
        assert float((first[name] - scores).norm()) <= 1e-5 * float(scores.norm()), name
    one, other = select_top(first, 0.1), select_top(alone, 0.1)
    assert one.overlap(other) / (one | other).count >= 0.999


@pytest.mark.parametrize(
    ("lean", "tolerance"),
    [
        ({"passes": 2}, 1e-5),
        ({"accumulate_on": "cpu"}, 1e-5),
        # Eight bits of every sum are kept, or of every product.
        ({"accumulate_dtype": "bfloat16"}, 1e-2),
        ({"autocast": "bfloat16"}, 1e-5),
    ],
)
def test_lean_scores_are_those_of_one_process(tmp_path: Path, lean: dict[str, Any], tolerance: float) -> None:
    objective = RefusalMargin(limit=EXAMPLES)
    first, second = run_in_processes(tmp_path, partial(score, objective, shared=True, **lean))
    alone = score(objective, shared=False, **lean)
    assert list(first) == list(alone)
    for name, scores in alone.items():
        assert first[name].dtype == scores.dtype
        assert torch.equal(first[name], second[name]), name
        difference = (first[name].float() - scores.float()).norm()
        assert float(difference) <= tolerance * float(scores.float().norm()), name
    assert select_top(first, 0.1) == select_top(second, 0.1)


def test_one_example_is_enough_for_two_processes(tmp_path: Path) -> None:
    first, second = run_in_processes(tmp_path, partial(score, RefusalMargin(limit=1), shared=True))
    alone = score(RefusalMargin(limit=1), shared=False)
    for name, scores in alone.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], scores)


class OwnRank(RefusalMargin):
    """In each process something else: other examples, or a loss that is not finite in the second, or no second."""

    def __init__(self, kind: str) -> None:
        super().__init__(limit=4)
        self.kind = kind

    def batches(self, tokenizer: object, *, batch_size: int) -> list[ObjectiveBatch]:
        if self.kind == "examples" and distributed.get_rank() == 1:
            self.limit = 3
        return super().batches(tokenizer, batch_size=batch_size)  # type: ignore[arg-type]

    def loss(self, model: nn.Module, batch: ObjectiveBatch) -> Tensor:
        if self.kind == "death" and distributed.get_rank() == 1:
            os._exit(1)
        bad = self.kind == "loss" and distributed.get_rank() == 1
        return super().loss(model, batch) * (float("nan") if bad else 1.0)


def test_other_examples_in_one_process_end_both(tmp_path: Path) -> None:
    for found in run_in_processes(tmp_path, partial(score, OwnRank("examples"), shared=True)):
        assert found.startswith("ValueError: `objective` expected to be the same in all 2 processes but process 1")
        assert "Give every process the same prompts" in found


def test_an_error_in_one_process_ends_both(tmp_path: Path) -> None:
    first, second = run_in_processes(tmp_path, partial(score, OwnRank("loss"), shared=True))
    assert second.startswith("RuntimeError: The loss of `objective` is nan in batch 2 of 2.")
    assert first.startswith("OtherProcessError: Scoring weights failed in process 1 of 2: RuntimeError: The loss of")


def test_the_death_of_one_process_ends_the_other(tmp_path: Path) -> None:
    found = run_although_one_dies(tmp_path, partial(score, OwnRank("death"), shared=True))
    assert found.startswith("RuntimeError: ")
    assert not (tmp_path / "1.pt").exists()


def test_scores_of_one_process_need_no_group() -> None:
    alone = score(RefusalMargin(limit=2), shared=False)
    assert isinstance(select_top(alone, 0.1), SafetyMask)
    for name, scores in score(RefusalMargin(limit=2), shared=True).items():
        assert torch.equal(scores, alone[name]), name
