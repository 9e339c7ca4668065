# SPDX-License-Identifier: Apache-2.0
"""What an update is compared with: the subspaces of a gradient, of an alignment update, or of an earlier run."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from lightning_safety.arguments import closest
from lightning_safety.language.weight_files import WeightFiles, common_shapes
from lightning_safety.monitoring.subspace import as_matrices, left_basis
from lightning_safety.monitoring.subspace_file import SubspaceFile
from lightning_safety.progress import track
from lightning_safety.scoring import SafetyObjective, mean_gradients

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def gradient_bases(
    model: nn.Module,
    objective: SafetyObjective,
    tokenizer: PreTrainedTokenizerBase,
    *,
    energy: float,
    batch_size: int = 8,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    show_progress: bool = True,
) -> dict[str, Tensor]:
    """Return bases of the leading left singular directions of an objective's gradient, by matrix.

    Args:
        model: The causal language model; left as it is, as by `expected_safety_impact`.
        objective: Whose gradient, the mean over its examples.
        tokenizer: The model's tokenizer.
        energy: The share of each gradient's energy to keep, in (0, 1].
        batch_size: Examples in one pass.
        include: Only weights whose names match one of these shell-style patterns.
        exclude: Leave out those whose names match one of these.
        show_progress: Whether to show bars.

    Returns:
        float32 [rows, rank], on the CPU; of fused experts one for each, under ``name[number]``.
    """
    gradients = mean_gradients(
        model,
        objective,
        tokenizer,
        batch_size=batch_size,
        include=include,
        exclude=exclude,
        show_progress=show_progress,
    )
    return _bases(gradients, energy, show_progress)


def alignment_bases(
    base: str | os.PathLike[str],
    aligned: str | os.PathLike[str],
    names: Sequence[str],
    *,
    energy: float,
    show_progress: bool = True,
) -> dict[str, Tensor]:
    """Return bases of the leading left singular directions of an alignment update, aligned − base, by matrix.

    Args:
        base: The checkpoint before alignment: a folder, a ``.safetensors`` file or a hub id.
        aligned: The aligned checkpoint.
        names: Of the weights.
        energy: The share of each update's energy to keep, in (0, 1].
        show_progress: Whether to show a bar.

    Raises:
        FileNotFoundError: There is no such checkpoint, or it lacks a file.
        ValueError: The checkpoints are of different architectures, or lack one of the weights.
    """
    files = WeightFiles(base), WeightFiles(aligned)
    shapes = common_shapes(files)
    for name in names:
        if name not in shapes:
            raise ValueError(
                f"`reference` expected checkpoints of the model that is trained but they have no `{name}`. "
                f"{closest(name, shapes)}"
            )
    updates: dict[str, Tensor] = {}
    for name in track(names, "Alignment's subspaces", enabled=show_progress):
        updates |= _bases({name: files[1].read(name).double() - files[0].read(name).double()}, energy, False)
    return updates


def saved_bases(path: str | os.PathLike[str], kind: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Return the bases that an earlier run saved, by matrix.

    Args:
        path: A file that `SubspaceOverlapMonitor` wrote.
        kind: Which of its bases.
        shapes: Of the matrices to compare.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no such file, or lacks one of the matrices.
    """
    file = SubspaceFile(path)
    there = file.matrices(kind)
    found = {}
    for name, shape in shapes.items():
        if name not in there:
            raise ValueError(
                f"`reference` expected a file with subspaces of the model that is trained but {os.fspath(path)!r} has "
                f"none of `{name}`. {closest(name, there)} Compare fewer weights with `include=`, or take another file."
            )
        found[name] = file.bases([kind], name)[kind]
        if len(found[name]) != shape[0]:
            raise ValueError(
                f"`reference` expected a file with subspaces of the model that is trained but those of `{name}` in "
                f"{os.fspath(path)!r} are of {len(found[name])} dimensions instead of {shape[0]}."
            )
    return found


def _bases(matrices: Mapping[str, Tensor], energy: float, show_progress: bool) -> dict[str, Tensor]:
    found = {}
    for name, tensor in track(matrices.items(), "Subspaces", total=len(matrices), enabled=show_progress):
        for label, matrix in as_matrices(name, tensor).items():
            found[label] = left_basis(matrix, energy=energy).vectors.float().cpu()
    return found
