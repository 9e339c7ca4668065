# SPDX-License-Identifier: Apache-2.0
"""Singular values and singular vectors through the smaller Gram matrix: one decomposition for every energy and rank."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_CHUNK_ENTRIES = 1 << 22
_ROUNDING = 1e-12  # of a sum of float64 energies
_POWER_ITERATIONS = 3
_FIRST_BLOCK = 128


@dataclass(frozen=True)
class Spectrum:
    """The singular values of a matrix above rounding, and the singular vectors on one side.

    Attributes:
        energies: σ², the largest first. float64 [rank].
        directions: The singular vectors of the matrix's shorter side (of its left side where a large matrix was
            sampled), one a column. float64 [shorter, rank].
        on_left: Whether these are left singular vectors.
        total: Σσ² of the whole matrix, whatever part of it `energies` holds.
        unexplained: By how much of `total`, at most, the best subspace of any rank keeps more than the leading
            directions here: 0 for an exact decomposition, the energy that was not sampled otherwise.
    """

    energies: Tensor
    directions: Tensor
    on_left: bool
    total: float
    unexplained: float = 0.0

    @property
    def rank(self) -> int:
        """The numerical rank, or of how many directions there are."""
        return len(self.energies)

    def rank_keeping(self, share: float) -> int:
        """Return the smallest number of directions that keep this share of the total energy; all if none does."""
        kept = self.energies.cumsum(0) >= share * self.total * (1 - _ROUNDING)
        return int(kept.to(torch.uint8).argmax()) + 1 if bool(kept.any()) else self.rank

    def share_kept(self, rank: int) -> float:
        """Return the share of the total energy in the first `rank` directions; NaN for a zero matrix."""
        return float(self.energies[:rank].sum()) / self.total if self.total else float("nan")


def gram_matrix(matrix: Tensor) -> Tensor:
    """Return the products of a matrix's rows (wide) or columns (tall, square) with each other.

    Args:
        matrix: [rows, columns].

    Returns:
        float64 [shorter, shorter], summed part by part: nothing of the matrix's size is made.
    """
    shorter = min(matrix.shape)
    gram = torch.zeros(shorter, shorter, dtype=torch.float64, device=_accurate_device(matrix))
    for strip in _strips(matrix, is_wide(matrix)):
        gram.addmm_(strip.T, strip)
    return gram


def is_wide(matrix: Tensor) -> bool:
    """Whether a matrix has its left singular vectors on the shorter side."""
    return matrix.shape[0] <= matrix.shape[1]


def spectrum_of_gram(gram: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Spectrum:
    """Return the spectrum of a matrix from its Gram matrix.

    Directions count as rounding where σ ≤ √(longer side) · ε · σ_max, ε that of the matrix's type (float32 for a
    narrower one), and never more finely than float64 resolves a Gram matrix.

    Args:
        gram: What `gram_matrix` returned.
        shape: The matrix's shape.
        dtype: The matrix's type.
    """
    energies, directions = torch.linalg.eigh(gram)
    energies, directions = energies.flip(0).clamp(min=0), directions.flip(1)
    precision = min(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    smallest = max(shape) * precision**2, len(gram) * torch.finfo(torch.float64).eps
    rank = int((energies > max(smallest) * energies[0]).sum()) if energies.numel() else 0
    total = float(gram.diagonal().sum())
    return Spectrum(energies[:rank], directions[:, :rank], on_left=shape[0] <= shape[1], total=total)


def exact_spectrum(matrix: Tensor) -> Spectrum:
    """Return the whole spectrum of a matrix [rows, columns], finite and floating-point."""
    return spectrum_of_gram(gram_matrix(matrix), tuple(matrix.shape), matrix.dtype)


def sampled_spectrum(matrix: Tensor, *, energy: float | None, rank: int | None, seed: int) -> Spectrum:
    """Return the leading part of a large matrix's spectrum, from random samples of its columns' span.

    Block power iteration (Halko, Martinsson and Tropp, "Finding Structure with Randomness", SIAM Review 53, 2011,
    algorithm 4.4), with more samples until `energy` or `rank` is reached. Where this would take half of the directions,
    the exact decomposition is as cheap and is returned.

    Args:
        matrix: [rows, columns].
        energy: The share of the total energy to reach.
        rank: Or the number of directions.
        seed: Of the samples.
    """
    shorter = min(matrix.shape)
    # Samples in float32 at least, which every device can multiply; what they span is made orthonormal in float64.
    matrix = matrix if matrix.dtype == torch.float64 else matrix.float()
    total = sum(float(strip.square().sum()) for strip in _strips(matrix, is_wide(matrix)))
    generator = torch.Generator().manual_seed(seed)
    samples = _FIRST_BLOCK if rank is None else rank + _FIRST_BLOCK // 4
    while 2 * samples < shorter:
        block = torch.randn(matrix.shape[1], samples, generator=generator).to(matrix)
        basis = _orthonormal(matrix @ block)
        for _ in range(_POWER_ITERATIONS):
            basis = _orthonormal(matrix @ _orthonormal(matrix.T @ basis))
        spectrum = spectrum_of_gram(gram_matrix(basis.T @ matrix), (samples, matrix.shape[1]), matrix.dtype)
        captured = float(spectrum.energies.sum())
        if rank is not None or captured >= (energy or 1.0) * total * (1 - _ROUNDING):
            directions = _orthonormal(basis.to(_accurate_device(matrix)).double() @ spectrum.directions)
            return Spectrum(spectrum.energies, directions, True, total, max(0.0, total - captured))
        samples *= 2
    return exact_spectrum(matrix)


def left_vectors(matrix: Tensor, spectrum: Spectrum, rank: int) -> Tensor:
    """Return the first `rank` left singular vectors of the matrix. float64 [rows, rank], orthonormal."""
    directions = spectrum.directions[:, :rank]
    if spectrum.on_left:
        return directions
    vectors = torch.cat([strip @ directions for strip in _strips(matrix, wide=False)])
    # Rounding turns the vectors of small singular values towards those of large ones: make them orthonormal again.
    return _orthonormal(vectors / spectrum.energies[:rank].sqrt())


def _orthonormal(vectors: Tensor) -> Tensor:
    basis: Tensor = torch.linalg.qr(vectors).Q
    return basis


def _strips(matrix: Tensor, wide: bool) -> Iterator[Tensor]:
    """Yield float64 copies of parts of a matrix, or of its transpose where it is wide, along the longer side."""
    longer = matrix.T if wide else matrix
    for strip in torch.split(longer, max(1, _CHUNK_ENTRIES // max(1, longer.shape[1]))):
        # Apple's GPUs have no float64.
        yield strip.to(_accurate_device(matrix)).double()


def _accurate_device(matrix: Tensor) -> torch.device:
    return torch.device("cpu") if matrix.device.type == "mps" else matrix.device
