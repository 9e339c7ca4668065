# SPDX-License-Identifier: Apache-2.0
"""Where a fine-tuned checkpoint moved, beside where alignment moved its base: tensor by tensor, from files."""

from __future__ import annotations

import csv
import fnmatch
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from lightning_safety.arguments import check_fraction, closest
from lightning_safety.files import replace_atomically
from lightning_safety.language.weight_files import WeightFiles, all_names, common_shapes, split_longer_side
from lightning_safety.monitoring.subspace import check_matrix
from lightning_safety.monitoring.updates import PAPER_ENERGIES, UpdateComparison, UpdatePair, compare_several_updates
from lightning_safety.progress import track
from lightning_safety.scoring.components import COMPONENTS, component_of, layer_of
from lightning_safety.scoring.shares import align_numbers

_PART_ENTRIES = 1 << 20


@dataclass(frozen=True)
class DriftRow(UpdateComparison):
    """One weight matrix, one pair of updates, one energy.

    Attributes:
        tensor: The matrix's name; of fused experts each has one, ``name[number]``.
        layer: Its layer.
        component: Its component, as in `SafetyMask.describe`.
        pair: Which updates: ``"finetuned | aligned"`` is U = finetuned − aligned against V = aligned − base;
            ``"other | aligned"`` and ``"finetuned | other"`` where a fourth checkpoint is given.
        cosine: Between the two updates.
        update_norm: Frobenius norm of the update.
        reference_norm: Frobenius norm of the reference.
    """

    tensor: str
    layer: str
    component: str
    pair: str
    cosine: float
    update_norm: float
    reference_norm: float


@dataclass(frozen=True)
class DriftSummary:
    """A group of matrices at one energy: overlap is their unweighted mean, energy kept and cosine ratios of sums."""

    group: str
    pair: str
    energy: float
    matrices: int
    overlap: float
    overlap_random: float
    energy_kept: float
    energy_kept_random: float
    cosine: float


def compare_checkpoints(
    base: str | os.PathLike[str],
    aligned: str | os.PathLike[str],
    finetuned: str | os.PathLike[str],
    other: str | os.PathLike[str] | None = None,
    *,
    energies: Sequence[float] = PAPER_ENERGIES,
    include: str | Sequence[str] = "*",
    show_progress: bool = True,
) -> list[DriftRow]:
    """Compare what fine-tuning changed with what alignment changed (arXiv 2505.14185, section 4).

    Tensors are read part by part, one matrix at a time. Memory is bound by n, the shorter side of a matrix (mostly
    the hidden size), not by the longer side nor the number of matrices. Held in float64 are three products n × n, two
    sets of eigenvectors and LAPACK's workspace, at the peak about twelve n × n matrices (1.6 GB for n = 4096) and about
    twenty with `other`, besides parts of some 150 MB. Only an embedding much longer than wide is larger than that.
    Vectors (norms, biases) are columns; fused experts are compared one by one.

    Args:
        base: The checkpoint before alignment: a folder, a ``.safetensors`` file or a hub id.
        aligned: The aligned checkpoint.
        finetuned: The checkpoint that was fine-tuned from it.
        other: Another one fine-tuned from `aligned`, such as on harmful data.
        energies: Shares of energy in (0, 1].
        include: Shell-style patterns of the names to compare.
        show_progress: Whether to show a bar.

    Raises:
        FileNotFoundError: There is no such checkpoint, or it lacks a file.
        ValueError: The weights to compare are not in all of the checkpoints or of different shapes, a pattern matches
            nothing, an energy is out of range, or a weight is not finite.
    """
    energies = [check_fraction(energy, "energies") for energy in energies]
    files = [WeightFiles(source) for source in (base, aligned, finetuned, *([other] if other is not None else []))]
    shapes = _chosen(files, include)
    rows: list[DriftRow] = []
    for name in track(shapes, "Comparing weights", enabled=show_progress):
        for label, shape, at in _matrices(name, shapes[name]):
            for pair, compared in _pairs(files, name, label, shape, at).items():
                rows += [_row(label, pair, compared, found) for found in compared.at(energies)]
    return rows


def summarise_drift(rows: Sequence[DriftRow]) -> list[DriftSummary]:
    """Return, for each pair and energy, all matrices together, by component and by layer."""
    components = sorted({row.component for row in rows}, key=_component_order)
    layers = sorted({row.layer for row in rows}, key=lambda layer: (not layer.isdecimal(), layer.zfill(6)))
    groups = {"all": list(rows)}
    groups |= {f"component {name}": [row for row in rows if row.component == name] for name in components}
    groups |= {f"layer {name}": [row for row in rows if row.layer == name] for name in layers}
    found = []
    for group, members in groups.items():
        for pair, energy in dict.fromkeys((row.pair, row.energy) for row in members):
            found.append(_summary(group, [row for row in members if (row.pair, row.energy) == (pair, energy)]))
    return found


def drift_table(summaries: Sequence[DriftSummary]) -> str:
    """Return one line for each pair and energy over all matrices, and for each component at the middle energy."""
    energies = sorted({one.energy for one in summaries})
    middle = energies[len(energies) // 2]
    lines: list[tuple[str, ...]] = []
    for pair in dict.fromkeys(one.pair for one in summaries):
        lines.append((pair, "energy", "matrices", "overlap", "(random)", "energy kept", "(random)", "cosine"))
        lines += [
            (one.group, f"{one.energy:.2f}", str(one.matrices), *(f"{value:.4f}" for value in _values(one)))
            for one in summaries
            if one.pair == pair
            and (one.group == "all" or (one.energy == middle and one.group.startswith("component ")))
        ]
    return "\n".join(align_numbers(lines))


def _values(one: DriftSummary) -> tuple[float, ...]:
    return one.overlap, one.overlap_random, one.energy_kept, one.energy_kept_random, one.cosine


def write_drift(rows: Sequence[DriftRow], path: str | os.PathLike[str]) -> None:
    """Write one line for each matrix, pair and energy as CSV."""
    _write(DriftRow, rows, path)


def write_summaries(summaries: Sequence[DriftSummary], path: str | os.PathLike[str]) -> None:
    """Write one line for each group, pair and energy as CSV."""
    _write(DriftSummary, summaries, path)


def _write(kind: type[Any], rows: Iterable[Any], path: str | os.PathLike[str]) -> None:
    with replace_atomically(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(kind)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def _chosen(files: Sequence[WeightFiles], include: str | Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the weights to compare; the others may differ."""
    patterns = [include] if isinstance(include, str) else include
    names = all_names(files)
    wanted = {name for pattern in patterns for name in fnmatch.filter(names, pattern)}
    shapes = common_shapes(files, wanted, advice="Leave it out with `include`, or compare checkpoints of one model.")
    for pattern in patterns:
        if not fnmatch.filter(shapes, pattern):
            raise ValueError(
                f"`include` expected to match names of weights but {pattern!r} matches none. {closest(pattern, names)}"
            )
    return shapes


def _matrices(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, int], int | None]]:
    """Yield label, shape and, of fused experts, the number of each matrix in a tensor."""
    if len(shape) == 1:
        yield name, (shape[0], 1), None
    elif len(shape) == 2:
        yield name, (shape[0], shape[1]), None
    elif len(shape) == 3:
        for number in range(shape[0]):
            yield f"{name}[{number}]", (shape[1], shape[2]), number
    else:
        raise ValueError(
            f"`{name}` expected to be a vector, a matrix or matrices [experts, rows, columns] but has shape {shape}. "
            "Leave it out with `include`."
        )


def _pairs(
    files: list[WeightFiles], name: str, label: str, shape: tuple[int, int], expert: int | None
) -> dict[str, UpdatePair]:
    """Compare the updates of one matrix."""
    updates = {"finetuned": (2, 1), "aligned": (1, 0)} | ({"other": (3, 1)} if len(files) > 3 else {})
    wanted = [("finetuned", "aligned")] + ([("other", "aligned"), ("finetuned", "other")] if len(files) > 3 else [])

    def parts() -> Iterator[list[Tensor]]:
        for cut in split_longer_side(shape, _PART_ENTRIES):
            read = [_read(file, name, cut, expert) for file in files]
            differences = [read[after] - read[before] for after, before in updates.values()]
            for difference in differences:
                check_matrix(difference, label)
            yield differences

    place = list(updates).index
    pairs = compare_several_updates(parts(), shape, [(place(first), place(second)) for first, second in wanted])
    return {f"{first} | {second}": pair for (first, second), pair in zip(wanted, pairs, strict=True)}


def _read(files: WeightFiles, name: str, cut: tuple[slice, slice], expert: int | None) -> Tensor:
    """Read part of a matrix in float64: differences of two checkpoints are small, and must not be rounded before."""
    if len(files.shapes[name]) == 1:
        return files.read_part(name, (cut[0],)).to(torch.float64)[:, None]
    return files.read_part(name, cut if expert is None else (expert, *cut)).to(torch.float64)


def _row(label: str, pair: str, compared: UpdatePair, found: UpdateComparison) -> DriftRow:
    return DriftRow(
        **asdict(found),
        tensor=label,
        layer=layer_of(label),
        component=component_of(label.partition("[")[0], (0,) * 3 if "[" in label else ()),
        pair=pair,
        cosine=compared.cosine,
        update_norm=math.sqrt(compared.update.total),
        reference_norm=math.sqrt(compared.reference.total),
    )


def _summary(group: str, rows: Sequence[DriftRow]) -> DriftSummary:
    energies = [row.update_norm**2 for row in rows]
    products = [row.update_norm * row.reference_norm for row in rows]
    inner = sum(row.cosine * product for row, product in zip(rows, products, strict=True) if product)
    norms = math.sqrt(sum(energies) * sum(row.reference_norm**2 for row in rows))
    return DriftSummary(
        group,
        rows[0].pair,
        rows[0].energy,
        len(rows),
        _mean([row.overlap for row in rows]),
        _mean([row.overlap_random for row in rows]),
        _weighted([row.energy_kept for row in rows], energies),
        _weighted([row.energy_kept_random for row in rows], energies),
        inner / norms if norms else float("nan"),
    )


def _mean(values: Sequence[float]) -> float:
    """Return the mean of those that are defined; NaN where none is."""
    defined = [value for value in values if not math.isnan(value)]
    return sum(defined) / len(defined) if defined else float("nan")


def _weighted(values: Sequence[float], weights: Sequence[float]) -> float:
    total = sum(weights)
    return sum(v * w for v, w in zip(values, weights, strict=True) if w) / total if total else float("nan")


def _component_order(name: str) -> tuple[int, str]:
    return (COMPONENTS.index(name) if name in COMPONENTS else len(COMPONENTS), name)
