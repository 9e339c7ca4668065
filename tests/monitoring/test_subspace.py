# SPDX-License-Identifier: Apache-2.0
"""Bases, overlap, energy kept and projections against float64 SVDs, and against what chance gives."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_safety.monitoring import subspace
from lightning_safety.monitoring.spectrum import exact_spectrum
from lightning_safety.monitoring.subspace import (
    as_matrices,
    basis_of_spectrum,
    energy_kept_ratio,
    left_basis,
    project_update,
    random_basis,
    random_directions,
    random_energy_kept,
    random_overlap,
    subspace_overlap,
)

PAPER_ENERGIES = (0.01, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99)


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def with_spectrum(rows: int, columns: int, values: Tensor, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    left = torch.linalg.qr(noise(rows, len(values), seed=seed, dtype=torch.float64)).Q
    right = torch.linalg.qr(noise(columns, len(values), seed=seed + 1, dtype=torch.float64)).Q
    return ((left * values.double()) @ right.T).to(dtype)


MATRICES: dict[str, Callable[[int], Tensor]] = {
    "random square": lambda seed: noise(40, 40, seed=seed),
    "random tall": lambda seed: noise(90, 31, seed=seed),
    "random wide": lambda seed: noise(31, 90, seed=seed),
    "steep tall": lambda seed: with_spectrum(80, 30, 0.7 ** torch.arange(30.0), seed),
    "steep wide": lambda seed: with_spectrum(30, 80, 0.7 ** torch.arange(30.0), seed),
    "rank 5 tall": lambda seed: with_spectrum(70, 40, torch.tensor([9.0, 7.0, 5.0, 3.0, 1.0]), seed),
    "rank 5 wide": lambda seed: with_spectrum(40, 70, torch.tensor([9.0, 7.0, 5.0, 3.0, 1.0]), seed),
    "rank 1": lambda seed: noise(30, 1, seed=seed) @ noise(1, 50, seed=seed + 1),
    "column": lambda seed: noise(60, 1, seed=seed),
    "row": lambda seed: noise(1, 60, seed=seed),
    "tiny numbers": lambda seed: 1e-25 * noise(40, 33, seed=seed),
    "float64": lambda seed: noise(33, 40, seed=seed, dtype=torch.float64),
    "bfloat16": lambda seed: noise(33, 40, seed=seed, dtype=torch.bfloat16),
}


def reference(matrix: Tensor, energy: float) -> Tensor:
    """The same by a full decomposition in float64."""
    left, values, _ = torch.linalg.svd(matrix.double(), full_matrices=False)
    energies = values.square()
    rank = int((energies.cumsum(0) < energy * energies.sum() * (1 - 1e-12)).sum()) + 1
    return left[:, : min(rank, int((values > 1e-6 * values[0]).sum()))]


@pytest.mark.parametrize("energy", [*PAPER_ENERGIES, 1.0])
@pytest.mark.parametrize("make", MATRICES.values(), ids=MATRICES)
def test_equals_a_full_decomposition(make: Callable[[int], Tensor], energy: float) -> None:
    first, second = make(0), make(10)
    bases = [left_basis(matrix, energy=energy) for matrix in (first, second)]
    expected = [reference(matrix, energy) for matrix in (first, second)]
    for basis, vectors, matrix in zip(bases, expected, (first, second), strict=True):
        assert basis.vectors.shape == vectors.shape
        assert torch.allclose(basis.vectors.T @ basis.vectors, torch.eye(basis.rank, dtype=torch.float64), atol=1e-9)
        assert subspace_overlap(basis, vectors) == pytest.approx(1, abs=1e-4)
        assert basis.energy == pytest.approx(energy_kept_ratio(matrix, vectors), abs=1e-4)
        assert basis.energy >= energy - 1e-6
        assert not basis.capped
    assert subspace_overlap(*bases) == pytest.approx(subspace_overlap(*expected), abs=1e-4)
    assert energy_kept_ratio(second, bases[0]) == pytest.approx(
        float((expected[0].T @ second.double()).norm() ** 2 / second.double().norm() ** 2), abs=1e-4
    )
    for kind in ("parallel", "orthogonal", "opposite"):
        inside = expected[0] @ (expected[0].T @ second.double())
        part = {"parallel": inside, "orthogonal": second.double() - inside, "opposite": -inside}[kind]
        found = project_update(second, bases[0], kind)  # type: ignore[arg-type]
        assert (found - part).norm() <= 1e-4 * second.double().norm()


def test_rank_above_the_numerical_rank_is_capped() -> None:
    basis = left_basis(MATRICES["rank 5 tall"](0), rank=12)
    assert (basis.rank, basis.asked, basis.capped) == (5, 12, True)
    assert basis.energy == pytest.approx(1)
    fitting = left_basis(MATRICES["rank 5 tall"](0), rank=3)
    assert (fitting.rank, fitting.asked, fitting.capped) == (3, 3, False)
    assert fitting.energy == pytest.approx((81 + 49 + 25) / 165, abs=1e-6)


def test_a_zero_update_has_no_subspace() -> None:
    zero, some = left_basis(torch.zeros(20, 30), energy=0.5), left_basis(noise(20, 30), energy=0.5)
    assert zero.rank == 0
    assert math.isnan(zero.energy)
    assert math.isnan(subspace_overlap(zero, some))
    assert math.isnan(subspace_overlap(zero, zero))
    assert math.isnan(random_overlap(zero.rank, some.rank, 20))
    assert math.isnan(energy_kept_ratio(torch.zeros(20, 30), some))
    assert energy_kept_ratio(noise(20, 30), zero) == 0
    assert torch.equal(project_update(noise(20, 3), zero, "orthogonal"), noise(20, 3).double())


@pytest.mark.parametrize("name", ["random tall", "random wide", "steep tall"])
def test_one_decomposition_serves_all_energies(name: str) -> None:
    matrix = MATRICES[name](3)
    spectrum = exact_spectrum(matrix)
    for energy in PAPER_ENERGIES:
        shared, alone = basis_of_spectrum(matrix, spectrum, energy=energy), left_basis(matrix, energy=energy)
        assert shared.rank == alone.rank
        assert shared.energy == alone.energy
        assert subspace_overlap(shared, alone) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize(("rows", "columns"), [(300, 500), (500, 300)])
def test_sampled_bases_of_large_matrices_say_what_they_lose(rows: int, columns: int) -> None:
    matrix = with_spectrum(rows, columns, 0.9 ** torch.arange(300.0)) + 1e-3 * noise(rows, columns)
    exact = left_basis(matrix, energy=0.9, method="exact")
    sampled = left_basis(matrix, energy=0.9, method="sampled")
    assert 0 < sampled.error < 0.1
    assert exact.error == 0
    assert sampled.rank == exact.rank
    assert subspace_overlap(exact, sampled) == pytest.approx(1, abs=1e-4)
    for narrow in (torch.bfloat16, torch.float16):
        basis = left_basis(matrix.to(narrow), energy=0.9, method="sampled")
        assert torch.allclose(basis.vectors.T @ basis.vectors, torch.eye(basis.rank, dtype=torch.float64), atol=1e-9)
        assert subspace_overlap(basis, left_basis(matrix.to(narrow), energy=0.9)) == pytest.approx(1, abs=1e-3)
    best = float((exact.vectors[:, : sampled.rank].T @ matrix.double()).norm() ** 2 / matrix.double().norm() ** 2)
    assert best - sampled.error - 1e-6 <= sampled.energy <= best + 1e-6  # float32 products
    assert left_basis(matrix, rank=20, method="sampled").rank == 20


def test_flat_spectra_are_decomposed_exactly_where_sampling_would_not_pay() -> None:
    basis = left_basis(noise(300, 320), energy=0.95, method="sampled")
    assert basis.error == 0
    assert basis.rank == left_basis(noise(300, 320), energy=0.95).rank


def test_large_matrices_are_sampled_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subspace, "LARGEST_EXACT", 250)
    large, small = (with_spectrum(rows, 500, 0.97 ** torch.arange(200.0)) for rows in (300, 200))
    assert left_basis(large, energy=0.9).error > 0
    assert left_basis(small, energy=0.9).error == 0


@pytest.mark.parametrize(("first", "second", "dimension"), [(3, 3, 20), (2, 11, 30), (25, 4, 40), (1, 1, 5)])
def test_random_subspaces_average_to_the_closed_form(first: int, second: int, dimension: int) -> None:
    draws = torch.tensor(
        [
            subspace_overlap(
                random_basis(dimension, first, seed=2 * n), random_basis(dimension, second, seed=2 * n + 1)
            )
            for n in range(600)
        ]
    )
    error = float(draws.std() / len(draws) ** 0.5)
    assert abs(float(draws.mean()) - random_overlap(first, second, dimension)) < 4 * error


def test_random_energy_kept_averages_to_the_closed_form() -> None:
    updates = {"a": 3 * noise(20, 7), "b": noise(30, 30, seed=1)}
    draws = [{"a": random_basis(20, 4, seed=2 * n), "b": random_basis(30, 15, seed=2 * n + 1)} for n in range(300)]
    kept = torch.tensor([energy_kept_ratio(updates, bases) for bases in draws])
    error = float(kept.std() / len(kept) ** 0.5)
    assert abs(float(kept.mean()) - random_energy_kept(updates, draws[0])) < 4 * error


def test_energy_kept_over_matrices_is_a_ratio_of_sums() -> None:
    axis = torch.tensor([[1.0], [0.0]])
    updates = {"a": torch.tensor([[3.0], [0.0]]), "b": torch.tensor([[0.0], [1.0]])}
    assert energy_kept_ratio(updates, {"a": axis, "b": axis}) == pytest.approx(0.9)


def test_random_directions_are_the_matrixs_own() -> None:
    matrix = MATRICES["rank 5 wide"](0)
    drawn = random_directions(matrix, 2, seed=4)
    assert drawn.rank == 2
    assert energy_kept_ratio(matrix, drawn) == pytest.approx(drawn.energy, abs=1e-6)
    assert subspace_overlap(drawn, left_basis(matrix, rank=5)) == pytest.approx(1)
    kept = {round(random_directions(matrix, 2, seed=seed).energy, 6) for seed in range(20)}
    assert len(kept) > 3
    assert (random_directions(matrix, 9, seed=0).rank, random_directions(matrix, 9, seed=0).capped) == (5, True)


def test_vectors_and_fused_experts() -> None:
    experts = noise(3, 4, 5)
    matrices = as_matrices("experts.down", experts)
    assert list(matrices) == ["experts.down[0]", "experts.down[1]", "experts.down[2]"]
    assert torch.equal(matrices["experts.down[2]"], experts[2])
    vector = noise(8)
    (column,) = as_matrices("norm", vector).values()
    assert left_basis(column, energy=0.5).rank == 1
    assert torch.allclose(project_update(vector, left_basis(column, rank=1)), vector.double())
    with pytest.raises(ValueError, match=r"`conv` expected to be a vector, a matrix or .* has shape \(2, 2, 2, 2\)"):
        as_matrices("conv", torch.zeros(2, 2, 2, 2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: left_basis(noise(3, 3)), "Just one of `energy` and `rank`"),
        (lambda: left_basis(noise(3, 3), energy=0.5, rank=1), "Just one of `energy` and `rank`"),
        (lambda: left_basis(noise(3, 3), energy=50), "`energy` expected to be in \\(0, 1\\] but got 50"),
        (lambda: left_basis(noise(3, 3), rank=0), "`rank` expected to be at least 1"),
        (lambda: left_basis(noise(3), rank=1), "`matrix` expected to be a floating-point matrix"),
        (lambda: left_basis(torch.full((2, 2), math.nan), rank=1), "`matrix` expected to be finite"),
        (lambda: left_basis(noise(3, 3), rank=1, method="fast"), "`method` expected"),  # type: ignore[arg-type]
        (lambda: subspace_overlap(noise(3, 1), noise(4, 1)), "as many rows but have 3 and 4"),
        (lambda: random_overlap(4, 1, 3), "from 0 to 3 but got 4 and 1"),
        (lambda: random_basis(3, 4, seed=0), "`rank` expected to be in 1 … 3 but got 4"),
        (lambda: energy_kept_ratio({"a": noise(3, 3)}, {"b": noise(3, 1)}), "the same names but only one has a, b"),
        (lambda: project_update(noise(3, 3), noise(4, 1)), "shapes \\(3, 3\\) and \\(4, 1\\)"),
        (lambda: project_update(noise(3, 3), noise(3, 1), "across"), "`kind` expected"),  # type: ignore[arg-type]
    ],
)
def test_bad_arguments(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
