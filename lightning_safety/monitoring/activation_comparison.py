# SPDX-License-Identifier: Apache-2.0
"""What a model makes of harmful and of harmless prompts: overlap, separability and the refusal direction.

Overlap after "Safety Subspaces are Not (Linearly) Distinct" (arXiv 2505.14185), the section on activations; with what
it leaves open settled: padding is never read, and overlap is also taken without the sets' means.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_safety.arguments import check_fraction
from lightning_safety.monitoring.separability import linear_separability
from lightning_safety.monitoring.subspace import LeftBasis, left_basis, random_overlap, subspace_overlap

_DRAWS = 4


@dataclass(frozen=True, eq=False)
class LayerComparison:
    """How one layer's activations of harmful and harmless prompts compare.

    Attributes:
        overlap: Mode subspace overlap of the two sets, in [0, 1]. The means are in it: where they are large, as they
            are in language models, this compares little else.
        overlap_random: Its expected value for independent random subspaces of the same ranks.
        overlap_shuffled: The overlap of two sets of the same sizes drawn from all prompts at random, the mean over
            draws: what two samples of one kind overlap. Unlike random subspaces they share what all prompts share.
        overlap_centred: The overlap of what is left of each set without its own mean. NaN where nothing is left.
        overlap_centred_random: Its expected value for random subspaces.
        overlap_centred_shuffled: Its mean over sets drawn at random.
        separability: Cross-validated share of prompts that a linear classifier tells apart.
        separability_chance: The larger set's share of the prompts: what guessing gives.
        ranks: The ranks of the harmful and of the harmless basis.
        ranks_centred: The same without the means.
        direction: The refusal direction: mean of harmful − mean of harmless. float32 [hidden].
    """

    overlap: float
    overlap_random: float
    overlap_shuffled: float
    overlap_centred: float
    overlap_centred_random: float
    overlap_centred_shuffled: float
    separability: float
    separability_chance: float
    ranks: tuple[int, int]
    ranks_centred: tuple[int, int]
    direction: Tensor = field(repr=False)


def compare_activations(
    harmful: Mapping[int, Tensor], harmless: Mapping[int, Tensor], *, energy: float = 0.6, seed: int = 0
) -> dict[int, LayerComparison]:
    """Compare the activations of harmful and harmless prompts, layer by layer.

    A set is the matrix [hidden, prompts]; its subspace the fewest left singular directions that keep the share `energy`
    of Σσ² (arXiv 2505.14185 takes up to 0.6). Overlap is ‖Q₁ᵀQ₂‖²_F / min(k₁, k₂).

    Args:
        harmful: As `last_token_activations` gives them, at least two prompts.
        harmless: The same layers; not necessarily as many prompts.
        energy: In (0, 1].
        seed: Of the folds of the cross-validation, and of the sets drawn at random.

    Raises:
        ValueError: The layers or the hidden sizes differ, a set has fewer than two prompts, `energy` is out of range,
            or an activation is not finite.
    """
    check_fraction(energy, "energy")
    _check_layers_agree(harmful, harmless, ("harmful", "harmless"))
    found = {}
    for number in sorted(harmful):
        sets = harmful[number].double(), harmless[number].double()
        separability = linear_separability(*sets, seed=seed)
        means = [activations.mean(dim=0) for activations in sets]
        whole, centred = _bases(sets, energy)
        together = torch.cat(sets)
        drawn = [_bases(_draw(together, len(sets[0]), seed + draw), energy) for draw in range(_DRAWS)]
        found[number] = LayerComparison(
            *_overlap(*whole),
            mean_of_defined(subspace_overlap(*bases) for bases, _ in drawn),
            *_overlap(*centred),
            mean_of_defined(subspace_overlap(*bases) for _, bases in drawn),
            separability.accuracy,
            separability.chance,
            ranks=(whole[0].rank, whole[1].rank),
            ranks_centred=(centred[0].rank, centred[1].rank),
            direction=(means[0] - means[1]).float(),
        )
    return found


def direction_cosines(start: Mapping[int, Tensor], now: Mapping[int, Tensor]) -> dict[int, float]:
    """Return the cosine of each layer's two directions; NaN where one is zero.

    Raises:
        ValueError: The layers or the hidden sizes differ.
    """
    _check_layers_agree(start, now, ("start", "now"))
    found = {}
    for number in sorted(start):
        first, second = start[number].double(), now[number].double()
        norms = float(first.norm() * second.norm())
        found[number] = max(-1.0, min(1.0, float(first @ second) / norms)) if norms else math.nan
    return found


def refusal_direction_cosine(start: Mapping[int, Tensor], now: Mapping[int, Tensor]) -> float:
    """Return the mean over layers of the cosines between two refusal directions: 1 where none has turned.

    Layers where a direction is zero have no cosine and are left out, such as the embeddings where all prompts end with
    the same token.

    Args:
        start: By layer number, [hidden], such as the `LayerComparison.direction` of the model before tuning.
        now: The same layers, later.

    Returns:
        In [−1, 1]; NaN where no layer has a cosine.

    Raises:
        ValueError: The layers or the hidden sizes differ.

    Example:
        >>> import torch
        >>> refusal_direction_cosine({8: torch.tensor([1.0, 0.0])}, {8: torch.tensor([0.0, 2.0])})
        0.0
    """
    return mean_of_defined(direction_cosines(start, now).values())


def mean_of_defined(values: Iterable[float]) -> float:
    """Return the mean of the values that are not NaN; NaN where none is."""
    defined = [value for value in values if not math.isnan(value)]
    return sum(defined) / len(defined) if defined else math.nan


def _bases(
    sets: tuple[Tensor, Tensor], energy: float
) -> tuple[tuple[LeftBasis, LeftBasis], tuple[LeftBasis, LeftBasis]]:
    """Return the bases of both sets, and those without each one's mean."""
    first, second = sets
    whole = left_basis(first.T, energy=energy), left_basis(second.T, energy=energy)
    centred = (left_basis((one - one.mean(dim=0)).T, energy=energy) for one in sets)
    return whole, (next(centred), next(centred))


def _draw(together: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return all rows as a set of `count` drawn at random, and the rest."""
    order = torch.randperm(len(together), generator=torch.Generator().manual_seed(seed)).to(together.device)
    return together[order[:count]], together[order[count:]]


def _overlap(first: LeftBasis, second: LeftBasis) -> tuple[float, float]:
    dimension = len(first.vectors)
    return subspace_overlap(first, second), random_overlap(first.rank, second.rank, dimension)


def _check_layers_agree(first: Mapping[int, Tensor], second: Mapping[int, Tensor], names: tuple[str, str]) -> None:
    sizes = [{number: values.shape[-1] for number, values in found.items()} for found in (first, second)]
    if not sizes[0] or sizes[0] != sizes[1]:
        raise ValueError(
            f"`{names[0]}` and `{names[1]}` expected to be of the same layers and hidden sizes but have "
            f"{sizes[0]} and {sizes[1]} (layer: size). Measure both on one model with the same `layers`."
        )
