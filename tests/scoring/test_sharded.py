# SPDX-License-Identifier: Apache-2.0
"""Scores and masks of a model that FSDP2 spreads over two processes are those of one process."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lightning_safety.processes import gather, rank
from lightning_safety.scoring import (
    RefusalMargin,
    SafetyMask,
    expected_safety_impact,
    select_bottom,
    select_neurons,
    select_random,
    select_top,
)
from lightning_safety.scoring.shards import ShardedScores
from tests.scoring.test_impact_processes import OwnRank
from tests.spawned import run_although_one_dies, run_in_processes
from tests.tiny import make_tiny_model, make_tiny_tokenizer

FRACTIONS = (0.003, 0.01, 0.1, 0.5, 0.97, 1.0)


def shard(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:  # type: ignore[union-attr]
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def score(model: nn.Module, **options: Any) -> dict[str, Tensor]:
    # Of five examples in batches of two, one process gets two batches, one of them half full, and the other one.
    given = {"objective": RefusalMargin(limit=5), "tokenizer": make_tiny_tokenizer(), "batch_size": 2, **options}
    return expected_safety_impact(model, shared=True, show_progress=False, **given)  # type: ignore[return-value]


def whole(scores: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.cat(gather(part)) for name, part in scores.items()}


def score_together(**options: Any) -> Any:
    torch.manual_seed(0)
    model = shard(make_tiny_model(intermediate_size=67, tie_word_embeddings=False))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = {name: weight.full_tensor() for name, weight in model.named_parameters()}  # type: ignore[attr-defined]
    scores = score(model, **options)
    kept = all(bool((parameter.grad.to_local() == 1).all()) for parameter in model.parameters())  # type: ignore[union-attr]
    same = all(torch.equal(weight.full_tensor(), before[name]) for name, weight in model.named_parameters())  # type: ignore[attr-defined]
    hooks = sum(len(parameter._post_accumulate_grad_hooks or ()) for parameter in model.parameters())
    return whole(scores), select_top(scores, 0.1), kept and same and not hooks


@pytest.mark.parametrize("options", [{}, {"scale": "magnitude"}, {"passes": 3, "accumulate_on": "cpu"}])
def test_scores_and_mask_are_those_of_one_process(tmp_path: Path, options: dict[str, Any]) -> None:
    (first, mask, untouched), (second, other, _) = run_in_processes(tmp_path, partial(score_together, **options))
    assert untouched
    assert mask == other
    alone = score(make_tiny_model(intermediate_size=67, tie_word_embeddings=False), **options)
    assert list(first) == list(alone)
    for name, scores in alone.items():
        assert torch.equal(first[name], second[name]), name
        assert float((first[name] - scores).norm()) <= 1e-5 * float(scores.norm()), name
    of_one = select_top(alone, 0.1)
    assert mask.shapes == of_one.shapes
    assert mask.overlap(of_one) / (mask | of_one).count >= 0.999


def made_up_scores() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "random": torch.rand(101, 40, generator=generator),
        "tied": torch.randint(0, 4, (57, 30), generator=generator).float() / 4,
        "zeros": torch.zeros(64, 20),
        "tiny": torch.rand(33, 7, generator=generator) * 1e-42,
        "one row": torch.rand(1, 90, generator=generator),
        "negative": -torch.rand(8, 8, generator=generator),
    }


def exclusion() -> SafetyMask:
    shapes = {name: tuple(scores.shape) for name, scores in made_up_scores().items()}
    # A tensor that was not scored changes nothing.
    shapes["elsewhere"] = (9, 9)
    return SafetyMask({name: torch.arange(0, rows * columns, 9) for name, (rows, columns) in shapes.items()}, shapes)


def select_everything(scores: Any) -> list[SafetyMask]:
    found = [select(scores, fraction) for select in (select_top, select_bottom) for fraction in FRACTIONS]
    found += [select_random(scores, fraction, seed=3) for fraction in FRACTIONS]
    return [*found, *(select_top(scores, fraction, exclude=exclusion()) for fraction in FRACTIONS[:4])]


def select_together() -> list[SafetyMask]:
    tensors, parts, starts = made_up_scores(), {}, {}
    for name, scores in tensors.items():
        rows = -(-len(scores) // 2)
        parts[name] = scores[rank() * rows : (rank() + 1) * rows]
        starts[name] = min(rank() * rows, len(scores)) * scores.shape[1]
    shapes = {name: tuple(scores.shape) for name, scores in tensors.items()}
    return select_everything(ShardedScores(parts, shapes, starts, torch.device("cpu")))


def test_equal_scores_give_the_same_mask(tmp_path: Path) -> None:
    first, second = run_in_processes(tmp_path, select_together)
    for one, other, alone in zip(first, second, select_everything(made_up_scores()), strict=True):
        assert one == other == alone
        assert one.metadata == alone.metadata


def refusals() -> list[str]:
    found = []
    frozen = shard(make_tiny_model())
    next(iter(frozen.model.layers)).self_attn.v_proj.weight.requires_grad_(False)  # type: ignore[union-attr, operator]
    partly = make_tiny_model()
    fully_shard(next(iter(partly.model.layers)), mesh=init_device_mesh("cpu", (2,)))
    sharded = shard(make_tiny_model())
    for attempt in (
        lambda: score(sharded, reduction="absolute"),
        lambda: score(frozen),
        lambda: score(partly),
        lambda: select_neurons(score(sharded), 0.1),
    ):
        try:
            attempt()
        except ValueError as error:
            found.append(str(error))
    return found


def test_what_is_not_supported_is_refused(tmp_path: Path) -> None:
    for found in run_in_processes(tmp_path, refusals):
        absolute, frozen, partly, neurons = found
        assert "`model` expected not to be sharded beside `reduction='absolute'`" in absolute
        assert "v_proj.weight` is frozen. Unfreeze it" in frozen
        assert "is whole. Apply `fully_shard` to the model too" in partly
        assert "`scores` expected to be of whole tensors" in neurons


def count_passes(prompts: int) -> int:
    model = shard(make_tiny_model())
    calls: list[int] = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    score(model, objective=RefusalMargin(limit=prompts), batch_size=1)
    return len(calls)


@pytest.mark.parametrize("prompts", [1, 3, 4])
def test_every_process_runs_as_many_forward_passes(tmp_path: Path, prompts: int) -> None:
    """One that ran fewer would let the others wait for its parts of the weights."""
    assert run_in_processes(tmp_path, partial(count_passes, prompts)) == [-(-prompts // 2)] * 2


def score_own(kind: str) -> Any:
    return score(shard(make_tiny_model()), objective=OwnRank(kind))


def test_other_examples_in_one_process_end_both(tmp_path: Path) -> None:
    for found in run_in_processes(tmp_path, partial(score_own, "examples")):
        assert found.startswith("ValueError: `objective` expected to be the same in all 2 processes but process 1")


def test_the_death_of_one_process_ends_the_other(tmp_path: Path) -> None:
    found = run_although_one_dies(tmp_path, partial(score_own, "death"))
    assert "Error: " in found
    assert not (tmp_path / "1.pt").exists()
