# SPDX-License-Identifier: Apache-2.0
"""What an update is compared with: the subspaces of a gradient, of an alignment update, or of an earlier run."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from lightning_safety.arguments import closest
from lightning_safety.language.weight_files import WeightFiles, common_shapes
from lightning_safety.monitoring.subspace import as_matrices, left_basis
from lightning_safety.monitoring.subspace_file import SubspaceFile
from lightning_safety.processes import map_in_rounds, rank
from lightning_safety.progress import track
from lightning_safety.scoring import MixtureLayout, RefusalMargin, SafetyObjective, mean_gradients

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
    mixture: MixtureLayout | None = None,
    show_progress: bool = True,
    shared: bool = False,
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
        mixture: Where the experts and routers of a mixture of experts are, if its family is not known.
        show_progress: Whether to show bars.
        shared: Whether the processes of the group, which hold the same weights, share examples and matrices. Then every
            process must call this; the bases are the first one's alone, the others get none.

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
        mixture=mixture,
        shared=shared,
        show_progress=show_progress,
    )

    def find(name: str) -> dict[str, Tensor]:
        return _bases(name, gradients[name], energy)

    return _collect(find, list(gradients), "Subspaces", show_progress, shared)


def alignment_bases(
    base: str | os.PathLike[str],
    aligned: str | os.PathLike[str],
    names: Sequence[str],
    *,
    energy: float,
    show_progress: bool = True,
    shared: bool = False,
) -> dict[str, Tensor]:
    """Return bases of the leading left singular directions of an alignment update, aligned − base, by matrix.

    Args:
        base: The checkpoint before alignment: a folder, a ``.safetensors`` file or a hub id.
        aligned: The aligned checkpoint.
        names: Of the weights.
        energy: The share of each update's energy to keep, in (0, 1].
        show_progress: Whether to show a bar.
        shared: As for `gradient_bases`.

    Raises:
        FileNotFoundError: There is no such checkpoint, or it lacks a file.
        ValueError: The checkpoints lack one of the weights, or it is of different shapes.
    """
    files = WeightFiles(base), WeightFiles(aligned)
    shapes = common_shapes(files, names)
    for name in names:
        if name not in shapes:
            raise ValueError(
                f"`reference` expected checkpoints of the model that is trained but they have no `{name}`. "
                f"{closest(name, shapes)}"
            )

    def find(name: str) -> dict[str, Tensor]:
        return _bases(name, files[1].read(name).double() - files[0].read(name).double(), energy)

    return _collect(find, names, "Alignment's subspaces", show_progress, shared)


def saved_bases(
    path: str | os.PathLike[str], kind: str, shapes: Mapping[str, tuple[int, ...]], *, energy: float
) -> dict[str, Tensor]:
    """Return the bases that an earlier run saved, by matrix.

    Args:
        path: A file that `SubspaceOverlapMonitor` wrote.
        kind: Which of its bases.
        shapes: Of the matrices to compare.
        energy: The share of energy that they must keep.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no such file, lacks one of the matrices, or keeps another share.
    """
    file = SubspaceFile(path)
    file.check([kind], shapes, energy=energy)
    return {name: file.bases([kind], name)[kind] for name in shapes}


def _bases(name: str, tensor: Tensor, energy: float) -> dict[str, Tensor]:
    return {
        label: left_basis(matrix, energy=energy).vectors.float().cpu()
        for label, matrix in as_matrices(name, tensor).items()
    }


def _collect(
    find: Callable[[str], dict[str, Tensor]], names: Sequence[str], description: str, show_progress: bool, shared: bool
) -> dict[str, Tensor]:
    """Return what is found under each name; where processes share the names, in the first of them alone."""
    found: dict[str, Tensor] = {}
    parts = map_in_rounds(find, names) if shared else map(find, names)
    for part in track(parts, description, total=len(names), enabled=show_progress):
        # One process writes them down; the memory of a machine need not hold them once for each.
        if not shared or rank() == 0:
            found |= part
    return found


def check_reference(reference: object) -> None:
    """Raise unless this is an objective, a mapping of ``base`` and ``aligned``, a path or None."""
    if isinstance(reference, dict):
        if set(reference) != {"base", "aligned"}:
            raise ValueError(
                f"`reference` expected to name `base` and `aligned` but names {', '.join(map(repr, reference))}. "
                "Pass for instance `reference={'base': 'path/of/base', 'aligned': 'path/of/aligned'}`."
            )
    elif reference is not None and not isinstance(reference, SafetyObjective | str):
        raise TypeError(
            "`reference` expected to be a SafetyObjective, a mapping of `base` and `aligned`, or a path but got "
            f"{type(reference).__name__}."
        )


def describe_reference(reference: SafetyObjective | dict[str, str] | str | None) -> str:
    """Return what the safety subspaces are of, in a few words."""
    if isinstance(reference, dict):
        return f"{reference['aligned']} - {reference['base']}"
    if isinstance(reference, str):
        return os.fspath(reference)
    described = (reference or RefusalMargin()).describe()
    return f"{described['objective']} ({described['examples']})" if "examples" in described else described["objective"]
