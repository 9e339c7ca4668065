# SPDX-License-Identifier: Apache-2.0
"""Two updates of one weight compared at every energy, from three small matrices that are summed part by part."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_safety.monitoring.spectrum import Spectrum, exact_spectrum, spectrum_of_gram
from lightning_safety.monitoring.subspace import random_overlap

PAPER_ENERGIES = (0.01, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99)
"""The shares of energy at which arXiv 2505.14185 compares subspaces (section 4)."""


@dataclass(frozen=True)
class UpdateComparison:
    """An update of a weight beside a reference, such as the alignment update, at one energy.

    Attributes:
        energy: The share of each one's energy that its subspace keeps.
        update_rank: Directions of the update's subspace.
        reference_rank: Directions of the reference's subspace.
        overlap: Of the two subspaces; NaN where one of the two is zero.
        overlap_random: Its expected value for random subspaces of these ranks.
        energy_kept: The share of the update's energy inside of the reference's subspace; NaN for a zero update.
        energy_kept_random: Its expected value for a random subspace of that rank.
    """

    energy: float
    update_rank: int
    reference_rank: int
    overlap: float
    overlap_random: float
    energy_kept: float
    energy_kept_random: float


@dataclass(frozen=True)
class UpdatePair:
    """What two updates of one weight have in common; every energy is read off it.

    Attributes:
        rows: Rows of the weight: the dimension in which the subspaces are.
        update: The spectrum of the update.
        reference: The spectrum of the reference.
        overlaps: Squared cosines between left singular directions. float64 [reference rank, update rank].
        kept: The update's energy along each of the reference's directions. float64 [reference rank].
        inner: The inner product of the two.
    """

    rows: int
    update: Spectrum
    reference: Spectrum
    overlaps: Tensor
    kept: Tensor
    inner: float

    @property
    def cosine(self) -> float:
        """The cosine between the two; NaN where one is zero."""
        norms = (self.update.total * self.reference.total) ** 0.5
        return self.inner / norms if norms else float("nan")

    def at(self, energies: Sequence[float]) -> list[UpdateComparison]:
        """Return the comparison at each energy, in (0, 1]."""
        summed = self.overlaps.cumsum(0).cumsum(1)
        kept = self.kept.cumsum(0)
        found = []
        for energy in energies:
            update, reference = self.update.rank_keeping(energy), self.reference.rank_keeping(energy)
            both = bool(update and reference)
            overlap = float(summed[reference - 1, update - 1]) / min(update, reference) if both else float("nan")
            inside = float(kept[reference - 1]) if reference else 0.0
            some = self.update.total > 0
            found.append(
                UpdateComparison(
                    energy,
                    update,
                    reference,
                    overlap,
                    random_overlap(update, reference, self.rows),
                    inside / self.update.total if some else float("nan"),
                    reference / self.rows if some else float("nan"),
                )
            )
        return found


def compare_to_bases(update: Tensor, bases: Mapping[str, Tensor], energy: float) -> dict[str, UpdateComparison]:
    """Compare one update with several subspaces; it is decomposed once, and its singular vectors are never made.

    Args:
        update: [rows, columns], finite.
        bases: Orthonormal bases [rows, k] by name.
        energy: The share of the update's energy that its own subspace keeps, in (0, 1].
    """
    spectrum = exact_spectrum(update)
    rank = spectrum.rank_keeping(energy)
    directions = spectrum.directions[:, :rank]
    if not spectrum.on_left:
        directions = directions / spectrum.energies[:rank].sqrt()
    exact = update.to(directions)
    found = {}
    for name, basis in bases.items():
        vectors = basis.to(directions)
        inside = vectors.T @ exact
        cosines = vectors.T @ directions if spectrum.on_left else inside @ directions
        smaller = min(rank, vectors.shape[1])
        some = spectrum.total > 0
        found[name] = UpdateComparison(
            energy,
            rank,
            vectors.shape[1],
            float(cosines.square().sum()) / smaller if smaller else float("nan"),
            random_overlap(rank, vectors.shape[1], len(vectors)),
            float(inside.square().sum()) / spectrum.total if some else float("nan"),
            vectors.shape[1] / len(vectors) if some else float("nan"),
        )
    return found


def compare_updates(
    parts: Iterable[tuple[Tensor, Tensor]], shape: tuple[int, int], dtype: torch.dtype = torch.float32
) -> UpdatePair:
    """Compare two updates of one weight, given part by part.

    Neither the updates nor their singular vectors are ever made: for a wide matrix the left singular vectors are those
    of U Uᵀ; for a tall one they are Q = U W Σ⁻¹, W those of Uᵀ U, so that Q_Vᵀ Q_U and Q_Vᵀ U follow from Vᵀ U.

    Args:
        parts: Update and reference in parts [rows, some columns] of a wide matrix or [some rows, columns] of a tall
            one, in order, float64.
        shape: The whole shape [rows, columns].
        dtype: The type in which the weights were stored, for what counts as rounding.
    """
    wide = shape[0] <= shape[1]
    shorter = min(shape)
    gram_update, gram_reference, mixed = (torch.zeros(shorter, shorter, dtype=torch.float64) for _ in range(3))
    inner = 0.0
    for update, reference in parts:
        first, second = (update.T, reference.T) if wide else (update, reference)
        gram_update.addmm_(first.T, first)
        gram_reference.addmm_(second.T, second)
        if wide:
            inner += float((first * second).sum())
        else:
            mixed.addmm_(second.T, first)
    update_spectrum, reference_spectrum = (
        spectrum_of_gram(gram, shape, dtype) for gram in (gram_update, gram_reference)
    )
    if wide:
        directions = reference_spectrum.directions
        cosines = directions.T @ update_spectrum.directions
        kept = ((gram_update @ directions) * directions).sum(dim=0)
    else:
        inner = float(mixed.diagonal().sum())
        across = (reference_spectrum.directions / reference_spectrum.energies.sqrt()).T @ mixed
        cosines = across @ (update_spectrum.directions / update_spectrum.energies.sqrt())
        kept = across.square().sum(dim=1)
    return UpdatePair(shape[0], update_spectrum, reference_spectrum, cosines.square(), kept, inner)
