# SPDX-License-Identifier: Apache-2.0
"""Seconds to compare updates of SmolLM2-135M's 210 matrices with a reference, against full decompositions of both.

python benchmarks/subspaces.py

Published code decomposes both for every energy. All 30 layers have the same seven shapes: one energy is measured on all
of them, the eleven of arXiv 2505.14185 on one.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lightning_safety.monitoring import left_basis
from lightning_safety.monitoring.subspace_file import SubspaceFile
from lightning_safety.monitoring.update_overlap import measure_update
from lightning_safety.monitoring.updates import PAPER_ENERGIES, compare_updates

HIDDEN, KEYS, INNER = 576, 192, 1536
ATTENTION = [(HIDDEN, HIDDEN), (KEYS, HIDDEN), (KEYS, HIDDEN), (HIDDEN, HIDDEN)]
SHAPES = [*ATTENTION, (INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER)]
Updates = dict[str, tuple[Tensor, Tensor]]


def make_updates(layers: int) -> Updates:
    """Return an update and a reference for each weight; their singular values fall as those of weight updates do."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for number, shape in enumerate(SHAPES * layers):
        scale = torch.linspace(0, -5, shape[1]).exp()
        first, second = (torch.randn(shape, generator=generator) * scale for _ in range(2))
        found[f"model.layers.{number // 7}.{number % 7}.weight"] = (first, second)
    return found


def prepare_check(updates: Updates, path: Path) -> Callable[[], list[float]]:
    """Return one check of `SubspaceOverlapMonitor`, with start weights and two kinds of bases in its file."""
    generator = torch.Generator().manual_seed(1)
    start = {name: torch.randn(update.shape, generator=generator) for name, (update, _) in updates.items()}
    bases = {name: left_basis(reference, energy=0.5).vectors for name, (_, reference) in updates.items()}
    SubspaceFile.write(path, start, {"safety": bases, "utility": bases}, {})
    moved = {name: weight + updates[name][0] for name, weight in start.items()}
    file = SubspaceFile(path)

    def check() -> list[float]:
        found = measure_update(moved.items(), file, ["safety", "utility"], energy=0.5)
        return [matrix.compared["safety"].overlap for matrix in found.matrices]

    return check


def from_files(updates: Updates, energies: Sequence[float]) -> list[float]:
    """What `lightning-safety subspace` computes: one decomposition of both for all energies."""
    overlaps = []
    for update, reference in updates.values():
        pair = compare_updates([(update.double(), reference.double())], (update.shape[0], update.shape[1]))
        overlaps += [found.overlap for found in pair.at(energies)]
    return overlaps


def full_decompositions(updates: Updates, energies: Sequence[float], *, dtype: torch.dtype) -> list[float]:
    """The same by full singular value decompositions of both for every energy."""

    def left(matrix: Tensor, energy: float) -> Tensor:
        vectors, values, _ = torch.linalg.svd(matrix.to(dtype), full_matrices=False)
        energies = values.square()
        return vectors[:, : int((energies.cumsum(0) < energy * energies.sum()).sum()) + 1]

    overlaps = []
    for update, reference in updates.values():
        for energy in energies:
            first, second = left(update, energy), left(reference, energy)
            smaller = min(first.shape[1], second.shape[1])
            overlaps.append(float((first.T @ second).square().sum()) / smaller)
            float((second.T @ update.to(dtype)).square().sum())  # energy kept
    return overlaps


def main() -> None:
    """Time all, print seconds, ratios to the full decompositions and the largest difference of an overlap."""
    single, double = "full SVDs, float32", "full SVDs, float64"
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| | matrices | energies | seconds | SVDs in float32 | SVDs in float64 | difference |\n" + "|---" * 7 + "|")
    for layers, energies in ((30, (0.5,)), (1, PAPER_ENERGIES)):
        updates = make_updates(layers)
        with tempfile.TemporaryDirectory() as folder:
            ways: dict[str, Callable[[], list[float]]] = {
                "from files": partial(from_files, updates, energies),
                single: partial(full_decompositions, updates, energies, dtype=torch.float32),
                double: partial(full_decompositions, updates, energies, dtype=torch.float64),
            }
            if len(energies) == 1:
                ways = {"one check of the monitor": prepare_check(updates, Path(folder) / "file.safetensors"), **ways}
            seconds, found = {}, {}
            for name, way in ways.items():
                start = time.perf_counter()
                found[name] = way()
                seconds[name] = time.perf_counter() - start
        for name in ways:
            ratios = " | ".join(f"{seconds[other] / seconds[name]:.1f} ×" for other in (single, double))
            apart = max(abs(one - other) for one, other in zip(found[name], found[double], strict=True))
            size = f"{len(updates)} | {len(energies)}"
            print(f"| {name} | {size} | {seconds[name]:.2f} | {ratios} | {apart:.1e} |")


if __name__ == "__main__":
    main()
