# SPDX-License-Identifier: Apache-2.0
"""Seconds to compare two updates of SmolLM2-135M's 210 matrices, against full decompositions as published code has it.

python benchmarks/subspaces.py

All 30 layers have the same seven shapes: one energy is measured on all of them, the paper's eleven on three.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_safety.monitoring.updates import PAPER_ENERGIES, compare_updates

HIDDEN, KEYS, INNER = 576, 192, 1536
SHAPES = [
    (HIDDEN, HIDDEN),
    (KEYS, HIDDEN),
    (KEYS, HIDDEN),
    (HIDDEN, HIDDEN),
    (INNER, HIDDEN),
    (INNER, HIDDEN),
    (HIDDEN, INNER),
]
Updates = list[tuple[Tensor, Tensor]]


def make_updates(layers: int) -> Updates:
    """Return pairs of updates whose singular values fall as those of weight updates do."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for shape in SHAPES * layers:
        scale = torch.linspace(0, -5, shape[1]).exp()
        found.append(tuple(torch.randn(shape, generator=generator) * scale for _ in range(2)))
    return found


def one_decomposition(updates: Updates, energies: Sequence[float]) -> list[float]:
    """Overlap and energy kept at every energy, from one decomposition of the smaller Gram matrix."""
    overlaps = []
    for update, reference in updates:
        pair = compare_updates([(update.double(), reference.double())], tuple(update.shape))
        overlaps += [found.overlap for found in pair.at(energies)]
    return overlaps


def full_decompositions(dtype: torch.dtype) -> Callable[[Updates, Sequence[float]], list[float]]:
    """The same by a full singular value decomposition of both for every energy."""

    def left(matrix: Tensor, energy: float) -> Tensor:
        vectors, values, _ = torch.linalg.svd(matrix.to(dtype), full_matrices=False)
        energies = values.square()
        return vectors[:, : int((energies.cumsum(0) < energy * energies.sum()).sum()) + 1]

    def compare(updates: Updates, energies: Sequence[float]) -> list[float]:
        overlaps = []
        for update, reference in updates:
            for energy in energies:
                first, second = left(update, energy), left(reference, energy)
                smaller = min(first.shape[1], second.shape[1])
                overlaps.append(float((first.T @ second).square().sum()) / smaller)
                float((second.T @ update.to(dtype)).square().sum())  # energy kept
        return overlaps

    return compare


def main() -> None:
    """Time all in turns, print medians, ratios and the largest difference of an overlap."""
    ways = {
        "one decomposition (Gram, float64)": one_decomposition,
        "full SVDs, float32": full_decompositions(torch.float32),
        "full SVDs, float64": full_decompositions(torch.float64),
    }
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| | matrices | energies | rounds | seconds, median | ratio | largest difference |\n" + "|---" * 7 + "|")
    for layers, energies, rounds in ((30, (0.5,), 1), (3, (0.5,), 3), (3, PAPER_ENERGIES, 3)):
        updates = make_updates(layers)
        times: dict[str, list[float]] = {name: [] for name in ways}
        found = {}
        for _ in range(rounds):
            for name, way in ways.items():
                start = time.perf_counter()
                found[name] = way(updates, energies)
                times[name].append(time.perf_counter() - start)
        ours = next(iter(ways))
        for name in ways:
            seconds = statistics.median(times[name])
            ratio = seconds / statistics.median(times[ours])
            apart = max(abs(a - b) for a, b in zip(found[name], found["full SVDs, float64"], strict=True))
            print(
                f"| {name} | {len(updates)} | {len(energies)} | {rounds} | {seconds:.2f} | {ratio:.1f} | {apart:.1e} |"
            )


if __name__ == "__main__":
    main()
