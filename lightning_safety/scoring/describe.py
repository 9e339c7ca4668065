# SPDX-License-Identifier: Apache-2.0
"""Where in the model the selected weights are: shares and enrichment by component, layer and expert."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lightning_safety.scoring.components import COMPONENTS, component_of, layer_of
from lightning_safety.scoring.expert_shares import ExpertShare, expert_patterns, expert_shares, expert_table
from lightning_safety.scoring.experts import expert_place
from lightning_safety.scoring.mask import SafetyMask
from lightning_safety.scoring.shares import HEADINGS, GroupShare, align_numbers, group_share, share_cells

if TYPE_CHECKING:
    from lightning_safety.scoring.router_load import RouterLoad


@dataclass(frozen=True)
class MaskDescription:
    """What `describe_mask` found.

    Attributes:
        mask: The mask in one line.
        components: By component (q, k, v, kv, o, gate, up, down, expert, head), then others.
        layers: By layer, from the first to the output head.
        cells: By layer and component, for those pairs that have weights.
        experts: By expert, in the order of the layers; empty in a dense model.
    """

    mask: str
    components: list[GroupShare]
    layers: list[GroupShare]
    cells: dict[tuple[str, str], GroupShare]
    experts: list[ExpertShare] = field(default_factory=list)

    def table(self) -> str:
        """Return the groupings as aligned plain text."""
        rows = [("component", *HEADINGS), *map(share_cells, self.components)]
        lines = align_numbers([*rows, ("layer", *HEADINGS), *map(share_cells, self.layers)])
        tables = [self.mask, "\n".join(lines[: len(rows)]), "\n".join(lines[len(rows) :])]
        return "\n\n".join([*tables, self.expert_table()] if self.experts else tables)

    def expert_table(self) -> str:
        """Return share, enrichment and load of the experts as aligned plain text; empty for a dense model.

        Where they are many, these are the spread over the experts of each layer, and the most enriched ones. Load is
        the share of the tokens that a router sent to an expert.
        """
        return expert_table(self.experts)

    def heatmap(self, path: str | os.PathLike[str]) -> None:
        """Draw enrichment by layer and component as a PNG.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
            OSError: The file cannot be written. An older file stays as it was.
        """
        from lightning_safety.scoring.heatmap import draw_heatmap

        draw_heatmap(self, path)


def describe_mask(mask: SafetyMask, router_load: RouterLoad | None = None) -> MaskDescription:
    """Return share and enrichment of the selected weights by component, by layer and by expert.

    Only weights that were scored count. Experts are found by the patterns of a `MixtureLayout` that the mask's metadata
    may hold, else by their names (``experts``) and by three dimensions.

    Args:
        mask: The mask.
        router_load: How many tokens each expert got, from `measure_router_load` on the same model.

    Raises:
        ValueError: `router_load` is of other experts.

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
    patterns = expert_patterns(mask)

    def component(name: str, shape: tuple[int, ...]) -> str:
        return "expert" if expert_place(name, shape, patterns) is not None else component_of(name, shape)

    places = {name: (layer_of(name), component(name, shape)) for name, shape in mask.shapes.items()}

    def grouped(key: Callable[[str], tuple[str, ...]]) -> dict[tuple[str, ...], GroupShare]:
        weights: dict[tuple[str, ...], int] = {}
        selected: dict[tuple[str, ...], int] = {}
        for name, shape in mask.shapes.items():
            group = key(name)
            scored = math.prod(shape) - sum(mask.unscored.get(name, {}).values())
            weights[group] = weights.get(group, 0) + scored
            selected[group] = selected.get(group, 0) + mask.indices[name].numel()
        return {group: group_share(" ".join(group), weights[group], selected[group], mask) for group in weights}

    components = grouped(lambda name: (places[name][1],))
    layers = grouped(lambda name: (places[name][0],))
    cells = grouped(lambda name: places[name])
    return MaskDescription(
        repr(mask),
        [components[(group,)] for group in ordered_components(group for (group,) in components)],
        [layers[(group,)] for group in ordered_layers(group for (group,) in layers)],
        {(layer, component): share for (layer, component), share in cells.items()},
        expert_shares(mask, router_load),
    )


def ordered_components(components: Iterable[str]) -> list[str]:
    """Return components in the order of `COMPONENTS`, unknown ones after them as they came."""
    return sorted(components, key=lambda name: COMPONENTS.index(name) if name in COMPONENTS else len(COMPONENTS))


def ordered_layers(layers: Iterable[str]) -> list[str]:
    """Return layers by number, then other weights, then the output head."""
    return sorted(layers, key=lambda name: (int(name) if name.isdecimal() else math.inf, name == "head"))
