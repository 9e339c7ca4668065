# SPDX-License-Identifier: Apache-2.0
"""Two updates of one weight compared at every energy, from three small matrices that are summed part by part."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_safety.monitoring.spectrum import Spectrum, exact_spectrum, sampled_spectrum, spectrum_of_gram
from lightning_safety.monitoring.subspace import LARGEST_EXACT, random_overlap

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
            shared = float(summed[reference - 1, update - 1]) if both else 0.0
            inside = float(kept[reference - 1]) if reference else 0.0
            found.append(_comparison(energy, (update, reference), self.rows, shared, inside, self.update.total))
        return found


def compare_to_bases(update: Tensor, bases: Mapping[str, Tensor], energy: float) -> dict[str, UpdateComparison]:
    """Compare one update with several subspaces; it is decomposed once, and its singular vectors are never made.

    Args:
        update: [rows, columns], finite.
        bases: Orthonormal bases [rows, k] by name.
        energy: The share of the update's energy that its own subspace keeps, in (0, 1].
    """
    large = min(update.shape) > LARGEST_EXACT
    spectrum = sampled_spectrum(update, energy=energy, rank=None, seed=0) if large else exact_spectrum(update)
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
        shared, kept = float(cosines.square().sum()), float(inside.square().sum())
        found[name] = _comparison(energy, (rank, vectors.shape[1]), len(vectors), shared, kept, spectrum.total)
    return found


def compare_updates(
    parts: Iterable[tuple[Tensor, Tensor]], shape: tuple[int, int], dtype: torch.dtype = torch.float32
) -> UpdatePair:
    """Compare two updates of one weight, given part by part; see `compare_several_updates`.

    Args:
        parts: Update and reference in parts [rows, some columns] of a wide matrix or [some rows, columns] of a tall
            one, in order, float64.
        shape: The whole shape [rows, columns].
        dtype: The type in which the weights were stored, for what counts as rounding.
    """
    return compare_several_updates(parts, shape, [(0, 1)], dtype)[0]


def compare_several_updates(
    parts: Iterable[Sequence[Tensor]],
    shape: tuple[int, int],
    pairs: Sequence[tuple[int, int]],
    dtype: torch.dtype = torch.float32,
) -> list[UpdatePair]:
    """Compare pairs of updates of one weight, given part by part; each update is decomposed once.

    Neither the updates nor their singular vectors are ever made: for a wide matrix the left singular vectors are those
    of U Uᵀ; for a tall one they are Q = U W Σ⁻¹, W those of Uᵀ U, so that Q_Vᵀ Q_U and Q_Vᵀ U follow from Vᵀ U.

    Args:
        parts: The updates in parts, as in `compare_updates`.
        shape: The whole shape [rows, columns].
        pairs: Positions of update and reference among the updates.
        dtype: The type in which the weights were stored, for what counts as rounding.
    """
    wide = shape[0] <= shape[1]
    shorter = min(shape)
    grams: dict[int, Tensor] = {number: _zeros(shorter) for pair in pairs for number in pair}
    mixed = {} if wide else {pair: _zeros(shorter) for pair in pairs}
    inner = dict.fromkeys(pairs, 0.0)
    for part in parts:
        tall = [update.T if wide else update for update in part]
        for number, gram in grams.items():
            gram.addmm_(tall[number].T, tall[number])
        for update, reference in pairs:
            if wide:
                inner[update, reference] += float((tall[update] * tall[reference]).sum())
            else:
                mixed[update, reference].addmm_(tall[reference].T, tall[update])
    spectra = {}
    for number in list(grams):
        # Only wide matrices need the product again; what a decomposition takes besides is several times its size.
        spectra[number] = spectrum_of_gram(grams[number] if wide else grams.pop(number), shape, dtype)
    found = []
    for pair in pairs:
        update_spectrum, reference_spectrum = (spectra[number] for number in pair)
        if wide:
            directions = reference_spectrum.directions
            cosines = directions.T @ update_spectrum.directions
            kept = ((grams[pair[0]] @ directions) * directions).sum(dim=0)
        else:
            inner[pair] = float(mixed[pair].diagonal().sum())
            across = (reference_spectrum.directions / reference_spectrum.energies.sqrt()).T @ mixed[pair]
            cosines = across @ (update_spectrum.directions / update_spectrum.energies.sqrt())
            kept = across.square().sum(dim=1)
        found.append(UpdatePair(shape[0], update_spectrum, reference_spectrum, cosines.square(), kept, inner[pair]))
    return found


def _comparison(
    energy: float, ranks: tuple[int, int], rows: int, shared: float, inside: float, total: float
) -> UpdateComparison:
    """Make a comparison of the sum of squared cosines, and of the update's energy inside the reference and at all."""
    update, reference = ranks
    smaller = min(ranks)
    return UpdateComparison(
        energy,
        update,
        reference,
        shared / smaller if smaller else float("nan"),
        random_overlap(update, reference, rows),
        inside / total if total else float("nan"),
        reference / rows if total else float("nan"),
    )


def _zeros(side: int) -> Tensor:
    return torch.zeros(side, side, dtype=torch.float64)
