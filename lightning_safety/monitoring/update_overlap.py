# SPDX-License-Identifier: Apache-2.0
"""How far an update lies in given subspaces: over all matrices, by component and by layer, beside chance."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from lightning_safety.drawing import new_figure
from lightning_safety.monitoring.cores import map_over_cores
from lightning_safety.monitoring.subspace import as_matrices, check_matrix, random_overlap, subspace_overlap
from lightning_safety.monitoring.subspace_file import SubspaceFile
from lightning_safety.monitoring.updates import UpdateComparison, compare_to_bases
from lightning_safety.processes import gather_shares, share_of
from lightning_safety.scoring.components import COMPONENTS, component_of, layer_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SAFETY, UTILITY = "safety", "utility"


@dataclass(frozen=True)
class MatrixOverlap:
    """One matrix's update: where it is, its squared Frobenius norm, and how it compares with each kind of subspace."""

    name: str
    layer: str
    component: str
    squared_norm: float
    compared: Mapping[str, UpdateComparison]


@dataclass(frozen=True)
class UpdateOverlap:
    """What `measure_update` found.

    Attributes:
        kinds: The kinds of subspaces, in order: ``"safety"``, then ``"utility"`` where there is one.
        matrices: Every matrix.
    """

    kinds: tuple[str, ...]
    matrices: tuple[MatrixOverlap, ...]

    @property
    def metrics(self) -> dict[str, float]:
        """Values by metric name; those of the utility subspaces end in ``_utility``, before ``_random``.

        Overlap is the unweighted mean over matrices that moved, its random value the mean over the same ones; energy
        kept is a ratio of sums. NaN where nothing moved.
        """
        found = {"update_norm": math.sqrt(sum(matrix.squared_norm for matrix in self.matrices))}
        for kind in self.kinds:
            suffix = "" if kind == SAFETY else f"_{kind}"
            found |= {name.replace("*", suffix): value for name, value in _values(self.matrices, kind).items()}
        return found

    def by(self, group: str) -> dict[str, dict[str, dict[str, float]]]:
        """Return the same values by kind of each ``"component"`` or ``"layer"``."""
        places = {getattr(matrix, group) for matrix in self.matrices}
        return {
            place: {
                kind: {
                    name.replace("*", ""): value
                    for name, value in _values([m for m in self.matrices if getattr(m, group) == place], kind).items()
                }
                for kind in self.kinds
            }
            for place in sorted(places, key=_order)
        }


def matrix_shapes(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the shape of each matrix to compare."""
    return {
        label: tuple(matrix.shape)
        for name, weight in weights.items()
        for label, matrix in as_matrices(name, weight).items()
    }


def measure_update(
    weights: Iterable[tuple[str, Tensor]],
    file: SubspaceFile,
    kinds: Sequence[str],
    *,
    energy: float,
    shared: bool = False,
) -> UpdateOverlap:
    """Compare weights − weights at the start with the subspaces in a file, matrix by matrix.

    Args:
        weights: Present weights by name, each on any device.
        file: Start weights and bases.
        kinds: Which bases.
        energy: The share of the update's energy that its own subspace keeps, in (0, 1].
        shared: Whether the processes of the group, which hold the same weights, share the matrices. Then every process
            must call this, and finds what one alone would.

    Raises:
        ValueError: A weight is not finite.
    """

    def compare(item: tuple[str, Tensor]) -> list[MatrixOverlap]:
        name, weight = item
        # In float32 at least: in a narrower type the difference would lose what small steps change.
        update = weight.detach().float() - file.start(name).to(weight.device).float()
        found = []
        for label, matrix in as_matrices(name, update).items():
            check_matrix(matrix, label)
            found.append(
                MatrixOverlap(
                    label,
                    layer_of(name),
                    component_of(name, weight.shape),
                    float(matrix.double().square().sum()),
                    compare_to_bases(matrix, file.bases(list(kinds), label), energy),
                )
            )
        return found

    by_weight = map_over_cores(compare, share_of(list(weights)) if shared else weights)
    by_weight = gather_shares(by_weight) if shared else by_weight
    return UpdateOverlap(tuple(kinds), tuple(one for found in by_weight for one in found))


def entanglement(file: SubspaceFile) -> dict[str, float]:
    """Return how far safety and utility subspaces themselves overlap, and by chance; means over matrices with both."""
    found, chance = [], []
    for matrix in file.matrices(SAFETY):
        safety, utility = file.bases([SAFETY, UTILITY], matrix).values()
        if safety.shape[1] and utility.shape[1]:
            found.append(subspace_overlap(safety, utility))
            chance.append(random_overlap(safety.shape[1], utility.shape[1], len(safety)))
    return {"overlap": _mean(found), "overlap_random": _mean(chance)}


def draw_update_overlap(found: UpdateOverlap) -> Figure:
    """Draw overlap and energy kept by component, beside what random subspaces of the same ranks give.

    No global state of matplotlib is touched.
    """
    groups = found.by("component")
    figure = new_figure(2.5 + 0.9 * len(groups), 6, dpi=120)
    width = 0.8 / len(found.kinds)
    for axes, name, title in zip(
        figure.subplots(2, 1), ("subspace_overlap", "energy_kept"), ("subspace overlap", "energy kept"), strict=True
    ):
        for number, kind in enumerate(found.kinds):
            places = [place - 0.4 + width * (number + 0.5) for place in range(len(groups))]
            axes.bar(places, [group[kind][name] for group in groups.values()], width * 0.92, label=f"{kind} subspace")
            chance = [group[kind][f"{name}_random"] for group in groups.values()]
            label = "random subspaces" if number == 0 else None
            axes.scatter(places, chance, marker="_", s=900 * width, color="black", zorder=3, label=label)
        axes.set_xticks(range(len(groups)), list(groups))
        axes.set_ylabel(title)
        axes.set_ylim(bottom=0)
    figure.axes[0].legend(fontsize=8)
    return figure


def _values(matrices: Sequence[MatrixOverlap], kind: str) -> dict[str, float]:
    """Return the four values over matrices; ``*`` stands for the kind's suffix."""
    compared = [matrix.compared[kind] for matrix in matrices]
    moved = [one for one in compared if not math.isnan(one.overlap)]
    total = sum(matrix.squared_norm for matrix in matrices)
    energies = list(zip(matrices, compared, strict=True))
    kept = sum(m.squared_norm * one.energy_kept for m, one in energies if m.squared_norm)
    kept_random = sum(m.squared_norm * one.energy_kept_random for m, one in energies if m.squared_norm)
    return {
        "subspace_overlap*": _mean([one.overlap for one in moved]),
        "subspace_overlap*_random": _mean([one.overlap_random for one in moved]),
        "energy_kept*": kept / total if total else math.nan,
        "energy_kept*_random": kept_random / total if total else math.nan,
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _order(place: str) -> tuple[int, str]:
    if place in COMPONENTS:
        return COMPONENTS.index(place), place
    return (int(place), place) if place.isdecimal() else (1 << 30, place)
