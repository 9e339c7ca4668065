# SPDX-License-Identifier: Apache-2.0
"""A model that two processes hold parts of (FSDP2) is watched as one that one process holds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import FSDPModule

from lightning_safety.callbacks import SafetyBudget, SafetyPreservingAdaptation, SubspaceOverlapMonitor
from lightning_safety.callbacks.strategies import REPLICATED, SHARDED
from lightning_safety.processes import rank, world_size
from tests.callbacks.budgets import ScriptedMonitor
from tests.callbacks.processes import PROCESSES, Sharded, whole_weights
from tests.callbacks.shared_fits import HARMFUL, BrokenInOne, activations, harmfulness, metrics_of
from tests.callbacks.toys import (
    OwnModule,
    assert_acted,
    make_batches,
    make_loader,
    make_smallest_model,
    mask_of_everything,
    quiet,
    weights_of,
)
from tests.spawned import run_in_processes
from tests.tiny import make_tiny_tokenizer

STEPS = 4


def make_model() -> nn.Module:
    return make_smallest_model(vocab_size=512, max_position_embeddings=256, tie_word_embeddings=False)


MASK = mask_of_everything(make_model())


class Scripted(ScriptedMonitor):
    """From the second step on it finds 12 prompts harmful, in the first process."""

    strategies = (*REPLICATED, SHARDED)

    def __init__(self) -> None:
        super().__init__({0: 0, 2: 12} if rank() == 0 else {0: 0}, every_n_steps=1)


def sgd(weights: Any) -> list[torch.optim.Optimizer]:
    return [torch.optim.SGD(weights, lr=0.05, momentum=0.9)]


def fit(folder: Path, callbacks: Sequence[pl.Callback]) -> dict[str, Any]:
    """Fit alone, or as one of two processes that share the model; the rows of a step are the same."""
    torch.manual_seed(7)
    model = make_model()
    alone = world_size() == 1
    module = (OwnModule if alone else Sharded)(model, sgd, tokenizer=make_tiny_tokenizer())
    rows = make_batches(STEPS * PROCESSES, vocabulary=512)
    settings: dict[str, Any] = {"default_root_dir": folder}
    batches = [torch.cat(rows[at : at + PROCESSES]) for at in range(0, len(rows), PROCESSES)]
    if not alone:
        strategy = ModelParallelStrategy(data_parallel_size=PROCESSES, tensor_parallel_size=1)
        settings |= {"devices": PROCESSES, "strategy": strategy, "use_distributed_sampler": False}
        batches = rows[rank() :: PROCESSES]
    trainer = pl.Trainer(**quiet(callbacks, **settings))
    trainer.fit(module, make_loader(batches))
    return {
        "metrics": metrics_of(trainer),
        "step": trainer.global_step,
        "weights": whole_weights(module.model),
        "sharded": any(isinstance(part, FSDPModule) for part in module.model.modules()),
    }


def outcome(folder: Path, *callbacks: pl.Callback) -> Any:
    try:
        return fit(folder, callbacks)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def work(folder: Path) -> dict[str, Any]:
    holding = [SafetyPreservingAdaptation(mask=MASK), harmfulness(every_n_steps=1)]
    return {
        "watched": outcome(folder / "watched", harmfulness(), activations(layers=[0, 1])),
        "without": outcome(folder / "without"),
        "held": outcome(folder / "held", *holding),
        "fewer": outcome(folder / "fewer", harmfulness(harmful=HARMFUL[:1], borderline=HARMFUL[:2], max_new_tokens=1)),
        "margin": outcome(folder / "margin", harmfulness(generate=False)),
        "broken judge": outcome(folder / "judge", harmfulness(judges=BrokenInOne())),
        "budget": outcome(folder / "budget", SafetyBudget(action="stop"), Scripted()),
        "rolling back": outcome(folder / "rollback", SafetyBudget(action="rollback"), Scripted()),
        "not supported": outcome(folder / "subspaces", SubspaceOverlapMonitor()),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def both(folder: Path) -> list[dict[str, Any]]:
    found = run_in_processes(folder, partial(work, folder))
    for one in found:
        assert isinstance(one, dict), one
    return found


def assert_alike(found: dict[str, float], expected: dict[str, float]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if "_rate" in name:
            assert found[name] == value or (value != value and found[name] != found[name]), name
        elif "seconds" not in name:
            assert found[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


def test_rates_and_margin_are_those_of_one_process(both: list[dict[str, Any]], folder: Path, tmp_path: Path) -> None:
    expected = fit(tmp_path, [harmfulness(), activations(layers=[0, 1])])
    assert "safety/activation_overlap" in expected["metrics"]
    assert not expected["sharded"]
    for found in both:
        assert found["watched"]["sharded"]
        assert_alike(found["watched"]["metrics"], expected["metrics"])
    (mine,) = tmp_path.rglob("safety.jsonl")
    (theirs,) = (folder / "watched").rglob("safety.jsonl")
    lines = [[json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] for path in (mine, theirs)]
    assert [line["step"] for line in lines[1]] == [line["step"] for line in lines[0]] == [0, 0, 2, 2, 4, 4]
    for one, other in zip(*lines, strict=True):
        assert one.get("rates") == other.get("rates")
    replies = [
        [json.loads(line).get("response") for line in next(path.rglob("safety_replies.jsonl")).open(encoding="utf-8")]
        for path in (tmp_path, folder / "watched")
    ]
    assert replies[0] == replies[1]


def test_uneven_prompts_and_no_replies_at_all(both: list[dict[str, Any]], tmp_path: Path) -> None:
    few = fit(tmp_path / "few", [harmfulness(harmful=HARMFUL[:1], borderline=HARMFUL[:2], max_new_tokens=1)])
    margin = fit(tmp_path / "margin", [harmfulness(generate=False)])
    for found in both:
        assert_alike(found["fewer"]["metrics"], few["metrics"])
        assert_alike(found["margin"]["metrics"], margin["metrics"])


def test_watching_changes_no_bit_and_holding_goes_on(both: list[dict[str, Any]]) -> None:
    for found in both:
        for name, weight in found["without"]["weights"].items():
            assert torch.equal(found["watched"]["weights"][name], weight)
        assert isinstance(found["held"], dict), found["held"]
        assert "safety/attack_success_rate" in found["held"]["metrics"]
        start = make_model()
        before = weights_of(start)
        start.load_state_dict(found["held"]["weights"], strict=False)
        assert_acted(SafetyPreservingAdaptation, start, before, MASK)


def test_a_judge_that_fails_in_one_process_ends_both(both: list[dict[str, Any]]) -> None:
    first, second = (found["broken judge"] for found in both)
    assert "TypeError" in second or "ValueError" in second
    assert "failed" in first or "Error" in first


def test_a_monitor_that_compares_weights_is_refused(both: list[dict[str, Any]]) -> None:
    for found in both:
        assert "`strategy` expected to run on a single device but got ModelParallelStrategy" in found["not supported"]


def test_a_budget_stops_both_and_does_not_roll_back(both: list[dict[str, Any]]) -> None:
    for found in both:
        assert found["without"]["step"] == STEPS
        assert found["budget"]["step"] == 2
        assert '`action="rollback"` expected a strategy that leaves the model whole' in found["rolling back"]
