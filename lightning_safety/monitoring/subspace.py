# SPDX-License-Identifier: Apache-2.0
"""Subspaces of weight updates: bases, overlap, energy kept, and what chance would give.

Formulae from "Safety Subspaces are Not (Linearly) Distinct" (arXiv 2505.14185), sections 3 and 4.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_safety.arguments import check_fraction, check_positive
from lightning_safety.monitoring.spectrum import Spectrum, exact_spectrum, left_vectors, sampled_spectrum

LARGEST_EXACT = 4096
"""Matrices whose shorter side is longer than this are sampled instead of decomposed, unless asked otherwise."""


@dataclass(frozen=True)
class LeftBasis:
    """An orthonormal basis of the leading left singular directions of a matrix.

    Attributes:
        vectors: One direction a column. float64 [rows, rank]; no column for a zero matrix.
        energy: The share of the matrix's energy Σσ² that the directions keep; NaN for a zero matrix.
        asked: The rank that was asked for, or None where an energy was. It is larger than `rank` where the matrix's
            numerical rank capped it.
        error: By how much `energy`, at most, falls short of what the best subspace of this rank keeps: 0 where the
            decomposition was exact.
    """

    vectors: Tensor
    energy: float
    asked: int | None = None
    error: float = 0.0

    @property
    def rank(self) -> int:
        """The number of directions."""
        return self.vectors.shape[1]

    @property
    def capped(self) -> bool:
        """Whether fewer directions than asked for rise above rounding."""
        return self.asked is not None and self.rank < self.asked


def left_basis(
    matrix: Tensor,
    *,
    energy: float | None = None,
    rank: int | None = None,
    method: Literal["auto", "exact", "sampled"] = "auto",
    seed: int = 0,
) -> LeftBasis:
    """Return a basis of a matrix's leading left singular directions.

    Exact through the smaller Gram matrix in float64. Matrices whose shorter side exceeds `LARGEST_EXACT` are sampled,
    with a bound on what that loses (`LeftBasis.error`).

    Args:
        matrix: [rows, columns], floating-point; computed in float64.
        energy: The share of Σσ² to keep, in (0, 1]: the fewest directions that reach it, relative to the true total.
        rank: Or the number of directions. Capped at the numerical rank (`LeftBasis.capped`).
        method: ``"exact"``, ``"sampled"``, or by size.
        seed: Of the samples.

    Raises:
        ValueError: `matrix` is not a finite matrix, or not just one of `energy` and `rank` is given and in range.

    Example:
        >>> basis = left_basis(torch.diag(torch.tensor([3.0, 1.0, 0.0])), rank=3)
        >>> basis.rank, basis.capped
        (2, True)
        >>> left_basis(torch.diag(torch.tensor([3.0, 1.0, 0.0])), energy=0.9).rank
        1
    """
    check_matrix(matrix)
    if (energy is None) == (rank is None):
        raise ValueError(f"Just one of `energy` and `rank` expected but got energy={energy} and rank={rank}.")
    if energy is not None:
        energy = check_fraction(energy, "energy")
    if rank is not None:
        rank = check_positive(rank, "rank")
    if method not in ("auto", "exact", "sampled"):
        raise ValueError(f"`method` expected to be 'auto', 'exact' or 'sampled' but got {method!r}.")
    if method == "sampled" or (method == "auto" and min(matrix.shape) > LARGEST_EXACT):
        spectrum = sampled_spectrum(matrix, energy=energy, rank=rank, seed=seed)
    else:
        spectrum = exact_spectrum(matrix)
    return basis_of_spectrum(matrix, spectrum, energy=energy, rank=rank)


def basis_of_spectrum(
    matrix: Tensor, spectrum: Spectrum, *, energy: float | None = None, rank: int | None = None
) -> LeftBasis:
    """Return a basis from a decomposition that is there already, so that one serves many energies."""
    wanted = spectrum.rank_keeping(energy) if energy is not None else rank or 0
    kept = min(wanted, spectrum.rank)
    error = spectrum.unexplained / spectrum.total if spectrum.total else 0.0
    return LeftBasis(left_vectors(matrix, spectrum, kept), spectrum.share_kept(kept), asked=rank, error=error)


def check_matrix(matrix: Tensor, name: str = "matrix") -> None:
    """Raise ValueError unless this is a finite floating-point matrix with entries."""
    if matrix.dim() != 2 or not matrix.is_floating_point() or not matrix.numel():
        raise ValueError(
            f"`{name}` expected to be a floating-point matrix but got {matrix.dtype} of shape {tuple(matrix.shape)}. "
            "`as_matrices` says how tensors of other dimensions are read."
        )
    if not bool(matrix.isfinite().all()):
        raise ValueError(f"`{name}` expected to be finite but holds NaN or infinity.")


def as_matrices(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Return a tensor as matrices by name: a vector as one column, fused experts [experts, …, …] one by one.

    Raises:
        ValueError: The tensor has no dimension, or more than three.

    Example:
        >>> list(as_matrices("experts.down", torch.zeros(2, 3, 4)))
        ['experts.down[0]', 'experts.down[1]']
        >>> as_matrices("norm", torch.zeros(3))["norm"].shape
        torch.Size([3, 1])
    """
    if tensor.dim() == 1:
        return {name: tensor[:, None]}
    if tensor.dim() == 2:
        return {name: tensor}
    if tensor.dim() == 3:
        return {f"{name}[{number}]": matrix for number, matrix in enumerate(tensor)}
    raise ValueError(
        f"`{name}` expected to be a vector, a matrix or matrices [experts, rows, columns] but has shape "
        f"{tuple(tensor.shape)}."
    )


def subspace_overlap(first: LeftBasis | Tensor, second: LeftBasis | Tensor) -> float:
    """Return the mode subspace overlap ‖Q₁ᵀQ₂‖²_F / min(k₁, k₂): 1 where one subspace holds the other, 0 if orthogonal.

    Section 4.1 of arXiv 2505.14185.

    Args:
        first: An orthonormal basis [d, k₁].
        second: Another [d, k₂].

    Returns:
        The overlap; NaN where a basis is empty, as that of a zero matrix is.

    Raises:
        ValueError: The bases are of spaces of different dimension.
    """
    left, right = _vectors(first), _vectors(second)
    if left.shape[0] != right.shape[0]:
        raise ValueError(
            f"`first` and `second` expected to have as many rows but have {left.shape[0]} and {right.shape[0]}."
        )
    smaller = min(left.shape[1], right.shape[1])
    return float((left.T @ right).square().sum()) / smaller if smaller else float("nan")


def random_overlap(first_rank: int, second_rank: int, dimension: int) -> float:
    """Return the expected overlap of two independent random subspaces, max(k₁, k₂) / d; NaN where a rank is 0.

    Example:
        >>> random_overlap(4, 10, 100)
        0.1
    """
    if dimension < 1 or not all(0 <= rank <= dimension for rank in (first_rank, second_rank)):
        raise ValueError(f"Ranks expected to be from 0 to {dimension} but got {first_rank} and {second_rank}.")
    return max(first_rank, second_rank) / dimension if first_rank and second_rank else float("nan")


def energy_kept_ratio(
    updates: Tensor | Mapping[str, Tensor],
    bases: LeftBasis | Tensor | Mapping[str, LeftBasis] | Mapping[str, Tensor],
) -> float:
    """Return Σ‖QᵀU‖² / Σ‖U‖² over matrices: how much of the updates lies in the subspaces. Section 3 of the paper.

    A random subspace of rank k keeps k / d of a matrix's energy (`random_energy_kept`).

    Args:
        updates: A matrix [d, n], or matrices by name.
        bases: An orthonormal basis [d, k] of each, under the same names.

    Returns:
        In [0, 1]; NaN where all updates are zero.

    Raises:
        ValueError: Names or numbers of rows differ.
    """
    pairs = _pairs(updates, bases)
    kept = sum(float((basis.T @ update.to(basis)).square().sum()) for update, basis in pairs)
    return _ratio(kept, sum(_squared_norm(update) for update, _ in pairs))


def random_energy_kept(
    updates: Tensor | Mapping[str, Tensor],
    bases: LeftBasis | Tensor | Mapping[str, LeftBasis] | Mapping[str, Tensor],
) -> float:
    """Return what `energy_kept_ratio` is on average with random subspaces of the same ranks, in closed form."""
    pairs = _pairs(updates, bases)
    kept = sum(_squared_norm(update) * basis.shape[1] / basis.shape[0] for update, basis in pairs)
    return _ratio(kept, sum(_squared_norm(update) for update, _ in pairs))


def random_basis(dimension: int, rank: int, *, seed: int) -> LeftBasis:
    """Return a basis of a subspace drawn uniformly: the control `Random`. Its energy is that of no matrix, NaN."""
    if not 0 < rank <= dimension:
        raise ValueError(f"`rank` expected to be in 1 … {dimension} but got {rank}.")
    sample = torch.randn(dimension, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return LeftBasis(torch.linalg.qr(sample).Q, float("nan"), asked=rank)


def random_directions(matrix: Tensor, rank: int, *, seed: int) -> LeftBasis:
    """Return `rank` of the matrix's own left singular directions, drawn at random: the control `RandomK`."""
    check_matrix(matrix)
    rank = check_positive(rank, "rank")
    spectrum = exact_spectrum(matrix)
    drawn = torch.randperm(spectrum.rank, generator=torch.Generator().manual_seed(seed))[:rank].sort().values
    vectors = left_vectors(matrix, spectrum, spectrum.rank)[:, drawn.to(matrix.device)]
    share = float(spectrum.energies.cpu()[drawn].sum()) / spectrum.total if spectrum.total else float("nan")
    return LeftBasis(vectors, share, asked=rank)


def project_update(
    update: Tensor,
    basis: LeftBasis | Tensor,
    kind: Literal["parallel", "orthogonal", "opposite"] = "parallel",
) -> Tensor:
    """Return the part of an update inside of a subspace (P U), outside of it (U − P U), or the first negated (−P U).

    Args:
        update: [d, n], or a vector [d].
        basis: An orthonormal basis [d, k], P its projector.
        kind: Which part. Section 3 of the paper.

    Returns:
        float64, in the shape of `update`. With an empty basis, P U is zero.

    Example:
        >>> axis = torch.tensor([[1.0], [0.0]])
        >>> project_update(torch.tensor([[2.0], [3.0]]), axis, "orthogonal").flatten().tolist()
        [0.0, 3.0]
    """
    if kind not in ("parallel", "orthogonal", "opposite"):
        raise ValueError(f"`kind` expected to be 'parallel', 'orthogonal' or 'opposite' but got {kind!r}.")
    ((matrix, vectors),) = _pairs(update.reshape(len(update), -1), basis)
    exact = matrix.to(vectors)
    parallel = vectors @ (vectors.T @ exact)
    part = {"parallel": parallel, "orthogonal": exact - parallel, "opposite": -parallel}[kind]
    return part.reshape(update.shape)


def _vectors(basis: LeftBasis | Tensor) -> Tensor:
    return basis.vectors if isinstance(basis, LeftBasis) else basis.double()


def _pairs(
    updates: Tensor | Mapping[str, Tensor],
    bases: LeftBasis | Tensor | Mapping[str, LeftBasis] | Mapping[str, Tensor],
) -> list[tuple[Tensor, Tensor]]:
    update_of = updates if isinstance(updates, Mapping) else {"update": updates}
    basis_of = bases if isinstance(bases, Mapping) else {"update": bases}
    if set(update_of) != set(basis_of):
        odd = ", ".join(sorted(set(update_of) ^ set(basis_of))[:5])
        raise ValueError(f"`updates` and `bases` expected to have the same names but only one has {odd}.")
    pairs = [(update, _vectors(basis_of[name])) for name, update in update_of.items()]
    for update, basis in pairs:
        if update.dim() != 2 or basis.dim() != 2 or len(update) != len(basis):
            raise ValueError(
                "An update [d, n] and a basis [d, k] of as many rows expected but got shapes "
                f"{tuple(update.shape)} and {tuple(basis.shape)}."
            )
    return pairs


def _squared_norm(update: Tensor) -> float:
    return float(update.detach().double().square().sum())


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")
