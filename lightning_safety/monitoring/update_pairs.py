# SPDX-License-Identifier: Apache-2.0
"""What the directions of several updates of one model have in common, at several energies."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from torch import Tensor

from lightning_safety.arguments import check_fraction
from lightning_safety.monitoring.activation_comparison import mean_of_defined
from lightning_safety.monitoring.rates import finite_or_none
from lightning_safety.monitoring.spectrum import exact_spectrum
from lightning_safety.monitoring.subspace import as_matrices, basis_of_spectrum, random_overlap, subspace_overlap
from lightning_safety.progress import track


def compare_updates(
    updates: Mapping[str, Mapping[str, Tensor]], energies: Sequence[float], *, show_progress: bool = True
) -> dict[str, list[dict[str, float | None]]]:
    """Return the mean overlap over matrices of each pair of updates, section 4.2 of arXiv 2505.14185.

    Each matrix's update keeps the fewest left singular directions that hold the share `energy` of Σσ²; matrices that
    did not move in one of a pair are left out of its mean. Vectors are left out: of one direction, all is kept.

    Args:
        updates: By name, the change of each weight, by the weight's name; the same names and shapes.
        energies: In (0, 1].
        show_progress: Whether to show a bar.

    Returns:
        By ``"<name> | <name>"``, for each energy: ``energy``, ``overlap``, and as ``overlap_random`` what independent
        random subspaces of the same ranks would give; None where no matrix moved in both.

    Raises:
        ValueError: An energy is out of range, or a weight is not finite.
    """
    pairs = list(itertools.combinations(updates, 2))
    found: dict[tuple[str, str, float], list[tuple[float, float]]] = {}
    weights = [name for name, weight in next(iter(updates.values())).items() if weight.dim() > 1]
    for name in track(weights, "Comparing updates", enabled=show_progress):
        matrices = {update: as_matrices(name, of[name].float()) for update, of in updates.items()}
        for label in matrices[pairs[0][0]]:
            spectra = {update: exact_spectrum(of[label]) for update, of in matrices.items()}
            for energy in energies:
                check_fraction(energy, "energies")
                bases = {
                    update: basis_of_spectrum(matrices[update][label], spectrum, energy=energy)
                    for update, spectrum in spectra.items()
                }
                for first, second in pairs:
                    ranks = bases[first].rank, bases[second].rank
                    chance = random_overlap(*ranks, len(bases[first].vectors))
                    overlap = subspace_overlap(bases[first], bases[second])
                    found.setdefault((first, second, energy), []).append((overlap, chance))
    return {
        f"{first} | {second}": [
            {
                "energy": energy,
                "overlap": _mean(found[first, second, energy], 0),
                "overlap_random": _mean(found[first, second, energy], 1),
            }
            for energy in energies
        ]
        for first, second in pairs
    }


def _mean(values: Sequence[tuple[float, float]], place: int) -> float | None:
    return finite_or_none(mean_of_defined(value[place] for value in values))
