# SPDX-License-Identifier: Apache-2.0
"""Guard-judged scores of several processes, which share out the replies too, are those of one."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed

from lightning_safety.scoring import GuardJudgedSafety, expected_safety_impact, guard_judged
from tests.scoring.guard_judged import PROMPTS, TEMPERATURE, make_guard, make_model
from tests.scoring.test_sharded import shard
from tests.spawned import run_in_processes
from tests.tiny import make_tiny_tokenizer


def score(prompts: int, *, shared: bool, replies: Any = None) -> dict[str, Tensor]:
    if replies is not None:
        guard_judged.generate_replies = replies
    objective = GuardJudgedSafety(
        make_guard(make_tiny_tokenizer()), PROMPTS[:prompts], max_new_tokens=9, temperature=TEMPERATURE
    )
    return expected_safety_impact(
        make_model(), objective, make_tiny_tokenizer(), batch_size=1, shared=shared, show_progress=False
    )


@pytest.mark.parametrize("prompts", [3, 1])
def test_scores_are_those_of_one_process(tmp_path: Path, prompts: int) -> None:
    first, second = run_in_processes(tmp_path, partial(score, prompts, shared=True))
    for name, scores in score(prompts, shared=False).items():
        assert torch.equal(first[name], second[name]), name
        assert float((first[name] - scores).norm()) <= 1e-5 * float(scores.norm()), name


def reply_by_rank(*arguments: Any, **_: Any) -> list[str]:
    """Each process hears something else, as it may by a rounding."""
    return [f"The river {'is low' if distributed.get_rank() else 'rises'}." for _ in arguments[2]]


def test_what_one_process_has_heard_all_score(tmp_path: Path) -> None:
    first, second = run_in_processes(tmp_path, partial(score, 3, shared=True, replies=reply_by_rank))
    assert isinstance(first, dict), first
    assert all(torch.equal(scores, second[name]) for name, scores in first.items())


def fail_in_second(*arguments: Any, **_: Any) -> list[str]:
    if distributed.get_rank() == 1:
        raise RuntimeError("no memory left")
    return ["Yes."] * len(arguments[2])


def test_an_error_in_one_process_while_it_generates_ends_both(tmp_path: Path) -> None:
    first, second = run_in_processes(tmp_path, partial(score, 3, shared=True, replies=fail_in_second))
    assert second == "RuntimeError: no memory left"
    assert first.startswith("OtherProcessError: Preparing the objective failed in process 1 of 2: RuntimeError: no mem")


def prepare_sharded() -> list[str]:
    objective = GuardJudgedSafety(make_guard(make_tiny_tokenizer()), PROMPTS, max_new_tokens=9)
    model = shard(make_model())
    objective.prepare_together(model, make_tiny_tokenizer())
    return [make_tiny_tokenizer().decode(judged.row.input_ids) for judged in objective._judged]


def test_of_a_sharded_model_every_process_generates_all(tmp_path: Path) -> None:
    """One that generated fewer replies would let the others wait for its parts of the weights."""
    first, second = run_in_processes(tmp_path, prepare_sharded)
    assert len(first) == len(PROMPTS)
    assert first == second
