# SPDX-License-Identifier: Apache-2.0
"""Where in the model the selected weights are: shares and enrichment by component and by layer."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from lightning_safety.scoring.components import COMPONENTS, component_of, layer_of
from lightning_safety.scoring.mask import SafetyMask


@dataclass(frozen=True)
class GroupShare:
    """How much of a mask lies in one group of weights.

    Attributes:
        group: The group's name: a component or a layer.
        weights: Scored weights in the group.
        selected: Selected weights in the group.
        share: The group's share of all selected weights, in [0, 1]; NaN if nothing is selected at all.
        enrichment: That share over the group's share of all scored weights: 1 where the group holds as many as a random
            mask would, 2 where it holds twice as many.
    """

    group: str
    weights: int
    selected: int
    share: float
    enrichment: float


@dataclass(frozen=True)
class MaskDescription:
    """What `describe_mask` found.

    Attributes:
        mask: The mask in one line.
        components: By component (q, k, v, o, gate, up, down, expert, head), then others.
        layers: By layer, from the first to the output head.
        cells: By layer and component, for those pairs that have weights.
    """

    mask: str
    components: list[GroupShare]
    layers: list[GroupShare]
    cells: dict[tuple[str, str], GroupShare]

    def table(self) -> str:
        """Return both groupings as aligned plain text."""
        rows = [_HEADINGS, *map(_cells_of, self.components)]
        lines = align_numbers([*rows, ("layer", *_HEADINGS[1:]), *map(_cells_of, self.layers)])
        return "\n\n".join([self.mask, "\n".join(lines[: len(rows)]), "\n".join(lines[len(rows) :])])

    def heatmap(self, path: str | os.PathLike[str]) -> None:
        """Draw enrichment by layer and component as a PNG.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
            OSError: The file cannot be written. An older file stays as it was.
        """
        from lightning_safety.scoring.heatmap import draw_heatmap

        draw_heatmap(self, path)


def describe_mask(mask: SafetyMask) -> MaskDescription:
    """Return share and enrichment of the selected weights by component and by layer.

    Example:
        >>> import torch
        >>> names = ["layers.0.q_proj.weight", "layers.0.v_proj.weight"]
        >>> mask = SafetyMask(
        ...     {names[0]: torch.tensor([0]), names[1]: torch.tensor([0, 1, 3])}, {name: (2, 2) for name in names}
        ... )
        >>> print(describe_mask(mask).table())
        SafetyMask(4 of 8 weights (50 %) in 2 tensors)
        <BLANKLINE>
        component  weights  selected    share  enrichment
        q                4         1   25.0 %        0.50
        v                4         3   75.0 %        1.50
        <BLANKLINE>
        layer      weights  selected    share  enrichment
        0                8         4  100.0 %        1.00
    """
    places = {name: (layer_of(name), component_of(name, shape)) for name, shape in mask.shapes.items()}

    def grouped(key: Callable[[str], tuple[str, ...]]) -> dict[tuple[str, ...], GroupShare]:
        weights: dict[tuple[str, ...], int] = {}
        selected: dict[tuple[str, ...], int] = {}
        for name, shape in mask.shapes.items():
            group = key(name)
            weights[group] = weights.get(group, 0) + math.prod(shape)
            selected[group] = selected.get(group, 0) + mask.indices[name].numel()
        return {group: _share(" ".join(group), weights[group], selected[group], mask) for group in weights}

    components = grouped(lambda name: (places[name][1],))
    layers = grouped(lambda name: (places[name][0],))
    cells = grouped(lambda name: places[name])
    return MaskDescription(
        repr(mask),
        [components[(group,)] for group in ordered_components(group for (group,) in components)],
        [layers[(group,)] for group in ordered_layers(group for (group,) in layers)],
        {(layer, component): share for (layer, component), share in cells.items()},
    )


def ordered_components(components: Iterable[str]) -> list[str]:
    """Return components in the order of `COMPONENTS`, unknown ones after them as they came."""
    return sorted(components, key=lambda name: COMPONENTS.index(name) if name in COMPONENTS else len(COMPONENTS))


def ordered_layers(layers: Iterable[str]) -> list[str]:
    """Return layers by number, then other weights, then the output head."""
    return sorted(layers, key=lambda name: (int(name) if name.isdecimal() else math.inf, name == "head"))


def _share(group: str, weights: int, selected: int, mask: SafetyMask) -> GroupShare:
    share = selected / mask.count if mask.count else math.nan
    enrichment = share * mask.scored / weights if weights else math.nan
    return GroupShare(group, weights, selected, share, enrichment)


_HEADINGS = ("component", "weights", "selected", "share", "enrichment")


def _cells_of(group: GroupShare) -> tuple[str, ...]:
    share = "–" if math.isnan(group.share) else f"{100 * group.share:.1f} %"
    enrichment = "–" if math.isnan(group.enrichment) else f"{group.enrichment:.2f}"
    return group.group, f"{group.weights:,}", f"{group.selected:,}", share, enrichment


def align_numbers(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Return the lines of a table: names on the left, numbers on the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
