# SPDX-License-Identifier: Apache-2.0
"""A checkpoint whose fine-tuning update was projected into the alignment update's subspace, or out of it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_safety.arguments import check_choice, check_fraction
from lightning_safety.files import make_folder_atomically
from lightning_safety.language.weight_files import SETTINGS, WeightFiles, common_shapes
from lightning_safety.monitoring.subspace import (
    LARGEST_EXACT,
    LeftBasis,
    as_matrices,
    check_matrix,
    left_basis,
    project_update,
    random_basis,
    random_directions,
)
from lightning_safety.progress import track

Kind = Literal["parallel", "orthogonal", "opposite"]
Directions = Literal["top", "random", "random_own"]


@dataclass(frozen=True)
class Projection:
    """What a projection did to the update of a checkpoint.

    Attributes:
        energy_kept: The share of the update's energy that was kept, Σ‖new − aligned‖² / Σ‖U‖², before rounding to the
            weights' type; NaN where finetuned and aligned are the same.
        matrices: How many matrices there are.
        capped: In how many the alignment update has fewer directions above rounding than `fraction` asks for. The
            controls take as many as there are, too.
        approximated: In how many the alignment update's directions were sampled, as those of large matrices are, and
            keep less of its energy than the best might.
    """

    energy_kept: float
    matrices: int
    capped: int
    approximated: int


@dataclass
class _Sums:
    """What is counted on the way."""

    all: float = 0.0
    kept: float = 0.0
    matrices: int = 0
    capped: int = 0
    approximated: int = 0

    @property
    def found(self) -> Projection:
        """What was done in all."""
        kept = self.kept / self.all if self.all else float("nan")
        return Projection(kept, self.matrices, self.capped, self.approximated)


def project_checkpoint(
    base: str | os.PathLike[str],
    aligned: str | os.PathLike[str],
    finetuned: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    kind: Kind = "orthogonal",
    fraction: float = 0.5,
    directions: Directions = "top",
    seed: int = 0,
    show_progress: bool = True,
) -> Projection:
    """Write aligned + projected (finetuned − aligned), section 3 of arXiv 2505.14185.

    In each weight matrix the update U = finetuned − aligned is projected by P, the projector on k = `fraction` ·
    min(rows, columns) left singular directions of V = aligned − base, or on as many as rise above rounding. Vectors
    count as one column, fused experts are projected one by one. The folder has the files of `aligned` and its types,
    and appears whole or not at all. One file of weights is in memory at a time.

    Args:
        base: The checkpoint before alignment: a folder, a ``.safetensors`` file or a hub id.
        aligned: The aligned checkpoint.
        finetuned: The checkpoint that was fine-tuned from it.
        output: A new or an empty folder.
        kind: ``"parallel"``: aligned + P U; ``"orthogonal"``: aligned + U − P U; ``"opposite"``: aligned − P U.
        fraction: Of the directions, in (0, 1].
        directions: ``"top"``: V's leading ones. Controls of the same rank: ``"random"``: those of a random matrix;
            ``"random_own"``: some of V's own, drawn at random.
        seed: Of the controls.
        show_progress: Whether to show a bar.

    Returns:
        The share of the update's energy that was kept, and in how many matrices V lacks directions that are asked for.

    Raises:
        FileExistsError: `output` is a file or holds something.
        FileNotFoundError: There is no such checkpoint, or it lacks a file.
        ValueError: The checkpoints are of different architectures, an argument is out of range, or a weight is not
            finite.
    """
    fraction = _check(kind, fraction, directions)
    files = [WeightFiles(base), WeightFiles(aligned, settings=True), WeightFiles(finetuned)]
    shapes = common_shapes(files)
    sums = _Sums()
    with make_folder_atomically(output, "output") as folder:
        _copy_settings(files[1], folder)
        bar = iter(track(range(len(shapes)), "Projecting weights", enabled=show_progress))
        for file in files[1].files():
            weights = {}
            for name in files[1].names_in(file):
                weights[name] = files[1].read(name)
                if name in shapes:
                    number = next(bar)
                    old, start, end = (one.read(name) for one in files)
                    weights[name] = _projected(
                        name, (old, start, end), kind, fraction, directions, seed + 100_003 * number, sums
                    )
            _save(weights, folder / file.name)
    return sums.found


def project_weights(
    base: Mapping[str, Tensor],
    aligned: Mapping[str, Tensor],
    finetuned: Mapping[str, Tensor],
    *,
    kind: Kind = "orthogonal",
    fraction: float = 0.5,
    directions: Directions = "top",
    seed: int = 0,
    show_progress: bool = True,
) -> tuple[dict[str, Tensor], Projection]:
    """Return what `project_checkpoint` writes, of weights in memory: nothing is left on disk.

    Args:
        base: The weights before alignment, by name.
        aligned: Those after it, of the same names and shapes.
        finetuned: Those fine-tuned from the aligned ones.
        kind: As there.
        fraction: As there.
        directions: As there.
        seed: As there.
        show_progress: As there.

    Returns:
        aligned + projected (finetuned − aligned), each in the aligned weight's type; and what `Projection` tells.

    Raises:
        ValueError: Names differ, an argument is out of range, or a weight is not finite.
    """
    fraction = _check(kind, fraction, directions)
    if not base.keys() == aligned.keys() == finetuned.keys():
        odd = sorted((base.keys() ^ aligned.keys()) | (base.keys() ^ finetuned.keys()))
        raise ValueError(f"`base`, `aligned` and `finetuned` expected to have the same names but differ in {odd[:5]}.")
    sums = _Sums()
    projected = {}
    for number, name in enumerate(track(list(aligned), "Projecting weights", enabled=show_progress)):
        weights = (base[name], aligned[name], finetuned[name])
        projected[name] = _projected(name, weights, kind, fraction, directions, seed + 100_003 * number, sums)
    return projected, sums.found


def _check(kind: str, fraction: float, directions: str) -> float:
    for name, value, choices in (("kind", kind, get_args(Kind)), ("directions", directions, get_args(Directions))):
        check_choice(value, name, choices)
    return check_fraction(fraction)


def _projected(
    name: str,
    weights: tuple[Tensor, Tensor, Tensor],
    kind: Kind,
    fraction: float,
    directions: Directions,
    seed: int,
    sums: _Sums,
) -> Tensor:
    """Return the new weight, and add what was done to the sums."""
    aligned, finetuned = weights[1].double(), weights[2].double()
    references = as_matrices(name, _difference(weights[1], weights[0]))
    updates = as_matrices(name, finetuned - aligned)
    parts = []
    for number, (label, update) in enumerate(updates.items()):
        check_matrix(update, label)
        rank = max(1, round(fraction * min(update.shape)))
        basis = _basis(references[label], rank, directions, seed + number)
        parts.append(project_update(update, basis, kind))
        sums.all += float(update.square().sum())
        sums.kept += float(parts[-1].square().sum())
        sums.matrices += 1
        sums.capped += basis.capped
        sums.approximated += basis.error > 0
    whole = torch.stack(parts) if aligned.dim() == 3 else parts[0]
    return (aligned + whole.reshape(aligned.shape)).to(weights[1].dtype)


def _difference(after: Tensor, before: Tensor) -> Tensor:
    """Return after − before in the type that says which directions are rounding: float32 unless both are finer."""
    finer = after.dtype == before.dtype == torch.float64
    return (after.double() - before.double()).to(torch.float64 if finer else torch.float32)


def _basis(reference: Tensor, rank: int, directions: Directions, seed: int) -> LeftBasis:
    """Return the directions, of all three kinds as many as there are of the leading ones."""
    if directions == "random_own" and min(reference.shape) <= LARGEST_EXACT:
        return random_directions(reference, rank, seed=seed)  # of one decomposition with the leading ones
    leading = left_basis(reference, rank=rank)
    if directions == "top" or not leading.rank:
        return leading
    if directions == "random":
        drawn = random_basis(len(reference), leading.rank, seed=seed)
    else:
        drawn = random_directions(reference, leading.rank, seed=seed)
    return replace(drawn, asked=rank, error=leading.error)


def _copy_settings(files: WeightFiles, folder: Path) -> None:
    """Copy configuration and tokenizer, and the index where there is one."""
    for path in files.folder.iterdir():
        if path.is_file() and path.suffix in SETTINGS:
            shutil.copy(path, folder / path.name)


def _save(weights: dict[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    save_file(weights, path, metadata={"format": "pt"})
