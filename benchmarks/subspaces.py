# SPDX-License-Identifier: Apache-2.0
"""Seconds to compare updates of SmolLM2-135M's 210 matrices with a reference, against full decompositions of both.

python benchmarks/subspaces.py

Published code decomposes both for every energy. All 30 layers have the same seven shapes: one energy is measured on all
of them, the eleven of arXiv 2505.14185 on one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_safety.monitoring import left_basis
from lightning_safety.monitoring.cores import map_over_cores
from lightning_safety.monitoring.updates import PAPER_ENERGIES, compare_to_bases, compare_updates

HIDDEN, KEYS, INNER = 576, 192, 1536
ATTENTION = [(HIDDEN, HIDDEN), (KEYS, HIDDEN), (KEYS, HIDDEN), (HIDDEN, HIDDEN)]
SHAPES = [*ATTENTION, (INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER)]


class Updates:
    """Pairs of an update and a reference, whose singular values fall as those of weight updates do."""

    def __init__(self, layers: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.pairs: list[tuple[Tensor, Tensor]] = []
        for shape in SHAPES * layers:
            scale = torch.linspace(0, -5, shape[1]).exp()
            first, second = (torch.randn(shape, generator=generator) * scale for _ in range(2))
            self.pairs.append((first, second))
        # What the monitor has found at fit start.
        self.kept = [{"safety": left_basis(reference, energy=0.5).vectors.float()} for _, reference in self.pairs]


def check(updates: Updates, energies: Sequence[float]) -> list[float]:
    """A check of `SubspaceOverlapMonitor`: the reference's bases are kept, the update is decomposed once."""
    (energy,) = energies
    items = [(update, bases) for (update, _), bases in zip(updates.pairs, updates.kept, strict=True)]
    return [found["safety"].overlap for found in map_over_cores(lambda item: compare_to_bases(*item, energy), items)]


def from_files(updates: Updates, energies: Sequence[float]) -> list[float]:
    """What `lightning-safety subspace` does: one decomposition of both for all energies."""
    overlaps = []
    for update, reference in updates.pairs:
        pair = compare_updates([(update.double(), reference.double())], (update.shape[0], update.shape[1]))
        overlaps += [found.overlap for found in pair.at(energies)]
    return overlaps


def full_decompositions(dtype: torch.dtype) -> Callable[[Updates, Sequence[float]], list[float]]:
    """The same by full singular value decompositions of both for every energy."""

    def left(matrix: Tensor, energy: float) -> Tensor:
        vectors, values, _ = torch.linalg.svd(matrix.to(dtype), full_matrices=False)
        energies = values.square()
        return vectors[:, : int((energies.cumsum(0) < energy * energies.sum()).sum()) + 1]

    def compare(updates: Updates, energies: Sequence[float]) -> list[float]:
        overlaps = []
        for update, reference in updates.pairs:
            for energy in energies:
                first, second = left(update, energy), left(reference, energy)
                smaller = min(first.shape[1], second.shape[1])
                overlaps.append(float((first.T @ second).square().sum()) / smaller)
                float((second.T @ update.to(dtype)).square().sum())  # energy kept
        return overlaps

    return compare


def main() -> None:
    """Time all, print seconds, ratios to the full decompositions and the largest difference of an overlap."""
    names = ["one check of the monitor", "from files", "full SVDs, float32", "full SVDs, float64"]
    ways = dict(zip(names, [check, from_files, *map(full_decompositions, (torch.float32, torch.float64))], strict=True))
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| | matrices | energies | seconds | SVDs in float32 | SVDs in float64 | difference |\n" + "|---" * 7 + "|")
    for layers, energies, chosen in ((30, (0.5,), names), (1, PAPER_ENERGIES, names[1:])):
        updates = Updates(layers)
        seconds, found = {}, {}
        for name in chosen:
            ways[name](Updates(1), energies)  # warm up
            start = time.perf_counter()
            found[name] = ways[name](updates, energies)
            seconds[name] = time.perf_counter() - start
        for name in chosen:
            ratios = " | ".join(f"{seconds[other] / seconds[name]:.1f} ×" for other in names[2:])
            apart = max(abs(a - b) for a, b in zip(found[name], found[chosen[-1]], strict=True))
            size = f"{len(updates.pairs)} | {len(energies)}"
            print(f"| {name} | {size} | {seconds[name]:.2f} | {ratios} | {apart:.1e} |")


if __name__ == "__main__":
    main()
