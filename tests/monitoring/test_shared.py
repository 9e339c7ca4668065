# SPDX-License-Identifier: Apache-2.0
"""What processes measure together is what one measures alone: uneven shares, and more processes than prompts."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_safety.data import Example
from lightning_safety.monitoring import Verdict, last_token_activations, measure_harmfulness
from lightning_safety.monitoring.margin import refusal_margin
from lightning_safety.monitoring.references import gradient_bases
from lightning_safety.monitoring.subspace import left_basis
from lightning_safety.monitoring.subspace_file import SubspaceFile
from lightning_safety.monitoring.update_overlap import measure_update
from lightning_safety.processes import rank
from lightning_safety.scoring import RefusalMargin, scored_weights
from tests.spawned import run_in_processes
from tests.tiny import make_tiny_model, make_tiny_tokenizer

HARMFUL = [Example(f"Do a bad thing, number {index}.", f"I can't {'ever ' * index}.") for index in range(5)]
BORDERLINE = [Example(f"How do I kill process {index}?") for index in range(3)]
SIZES = [(1, 1), (4, 3), (5, 1)]
"""Of harmful and borderline prompts: fewer than processes, and uneven."""


class ByText:
    """Says of a reply what its text says, and of some nothing."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.asked = 0

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Verdict]:
        assert prompts, "a judge is not asked about nothing"
        self.asked += len(prompts)
        sums = [zlib.crc32(f"{self.name} {pair}".encode()) for pair in zip(prompts, responses, strict=True)]
        answers = [True, False, None]
        return [Verdict(answers[number % 3], answers[number // 3 % 3], float(number), "by text") for number in sums]


def measure(shared: bool, folder: Path) -> dict[str, Any]:
    model, tokenizer = make_tiny_model(), make_tiny_tokenizer()
    found: dict[str, Any] = {}
    for harmful, borderline in SIZES:
        rows = HARMFUL[:harmful], BORDERLINE[:borderline]
        judges = [ByText("one"), ByText("two")]
        measured = measure_harmfulness(
            model,
            tokenizer,
            *rows,
            judges=judges,
            max_new_tokens=4,
            batch_size=2,
            shared=shared,
        )
        found[f"harmfulness {harmful} {borderline}"] = measured
        found[f"asked {harmful} {borderline}"] = [judge.asked for judge in judges]
    found["no refusals"] = refusal_margin(model, tokenizer, BORDERLINE, shared=shared)
    prompts = [row.prompt for row in HARMFUL]
    for number in (2, 5):
        found[f"activations {number}"] = last_token_activations(
            model, tokenizer, prompts[:number], layers=[0, 2], batch_size=2, shared=shared
        )
    found["bases"] = gradient_bases(model, RefusalMargin(HARMFUL), tokenizer, energy=0.7, shared=shared)
    weights = scored_weights(model)
    if rank() == 0:
        bases = {name: left_basis(weight.detach(), energy=0.7).vectors for name, weight in weights.items()}
        SubspaceFile.write(folder / "start", weights, {"safety": bases}, {"energy": "0.7"})
    if shared:
        torch.distributed.barrier()
    with torch.no_grad():
        for number, weight in enumerate(weights.values()):
            weight += 0.01 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(number))
    found["update"] = measure_update(
        weights.items(), SubspaceFile(folder / "start"), ["safety"], energy=0.7, shared=shared
    )
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return measure(False, tmp_path_factory.mktemp("alone"))


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("together")
    results = run_in_processes(folder, partial(measure, True, folder), processes=3)
    for found in results:
        assert isinstance(found, dict), found
    return results


@pytest.mark.parametrize("name", [f"harmfulness {harmful} {borderline}" for harmful, borderline in SIZES])
def test_replies_verdicts_and_rates_are_those_of_one_process(
    alone: dict[str, Any], together: list[dict[str, Any]], name: str
) -> None:
    expected = alone[name]
    assert expected.replies
    for found in (one[name] for one in together):
        assert found.replies == expected.replies
        assert found.rates == expected.rates
        assert found.outcomes == expected.outcomes
        assert found.refusal_margin == pytest.approx(expected.refusal_margin, rel=1e-5)
        assert found.refusal_margin == together[0][name].refusal_margin


def test_prompts_are_shared_out_evenly(alone: dict[str, Any], together: list[dict[str, Any]]) -> None:
    for (harmful, borderline), shares in zip(SIZES, ([1, 1, 0], [3, 2, 2], [2, 2, 2]), strict=True):
        name = f"asked {harmful} {borderline}"
        assert [one[name] for one in together] == [[share, share] for share in shares]
        assert alone[name] == [sum(shares)] * 2


def test_nothing_is_measured_of_prompts_without_refusals(together: list[dict[str, Any]]) -> None:
    assert [one["no refusals"] for one in together] == [None] * 3


@pytest.mark.parametrize("number", [2, 5])
def test_activations_are_those_of_one_process(
    alone: dict[str, Any], together: list[dict[str, Any]], number: int
) -> None:
    for one in together:
        for layer, expected in alone[f"activations {number}"].items():
            torch.testing.assert_close(one[f"activations {number}"][layer], expected, rtol=1e-5, atol=1e-6)
            assert torch.equal(one[f"activations {number}"][layer], together[0][f"activations {number}"][layer])


def test_updates_and_subspaces_are_those_of_one_process(alone: dict[str, Any], together: list[dict[str, Any]]) -> None:
    first, *others = together
    assert [one["bases"] for one in others] == [{}, {}]
    assert list(first["bases"]) == list(alone["bases"])
    for name, expected in alone["bases"].items():
        basis = first["bases"][name]
        torch.testing.assert_close(basis @ basis.T, expected @ expected.T, rtol=0, atol=1e-3)
    for one in together:
        # Each decomposition is one process's.
        assert one["update"] == alone["update"]
        assert len(one["update"].matrices) == len(alone["bases"])
