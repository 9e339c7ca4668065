# SPDX-License-Identifier: Apache-2.0
"""How much of a mask lies in each expert, beside how many tokens the routers sent there."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_safety.scoring.components import layer_of
from lightning_safety.scoring.experts import expert_place, selected_by_expert
from lightning_safety.scoring.mask import SafetyMask
from lightning_safety.scoring.shares import (
    HEADINGS,
    GroupShare,
    align_numbers,
    decimal,
    group_share,
    percent,
    share_cells,
)

if TYPE_CHECKING:
    from lightning_safety.scoring.router_load import RouterLoad

_LISTED = 32
_MOST_ENRICHED = 10
_SUMMARISED = 3


@dataclass(frozen=True)
class ExpertShare(GroupShare):
    """How much of a mask lies in one expert.

    Attributes:
        layer: Its layer.
        module: Name of the module that holds it.
        expert: Its own name: a number, as a rule.
        scored: Whether any of its weights was scored; none is where no token reached it.
        load: Share of the tokens that its router sent to it, in [0, 1]; None where that was not measured.
    """

    layer: str
    module: str
    expert: str
    scored: bool
    load: float | None = None


def expert_patterns(mask: SafetyMask) -> list[str] | None:
    """Return the patterns of the modules that hold experts, where the mask's metadata has any.

    Raises:
        ValueError: They are not a list of patterns.
    """
    # A combination of two masks keeps the metadata of both under longer keys.
    found = next((mask.metadata[key] for key in ("experts", "left.experts") if key in mask.metadata), None)
    if found is None:
        return None
    try:
        patterns = json.loads(found)
    except ValueError:
        patterns = None
    if not isinstance(patterns, list) or not all(isinstance(pattern, str) for pattern in patterns):
        raise ValueError(
            f"`metadata` expected to hold a JSON list of patterns under 'experts' but got {found!r:.80}."
            " `MixtureLayout.describe` writes it."
        )
    return patterns


def expert_shares(mask: SafetyMask, router_load: RouterLoad | None = None) -> list[ExpertShare]:
    """Return the share of each expert, in the order of the mask's tensors; empty for a dense model.

    Raises:
        ValueError: `router_load` is of other experts.
    """
    weights, selected = _counts_by_expert(mask)
    if router_load is not None:
        router_load.check_experts({module: list(counts) for module, counts in weights.items()})
    layers = [layer_of(module) for module in weights]
    shares = []
    for module, counts in weights.items():
        layer = layer_of(module)
        label = layer if layers.count(layer) == 1 else module
        loads = None if router_load is None else router_load.shares[module]
        for expert, count in counts.items():
            share = group_share(f"{label}/{expert}", count, selected[module][expert], mask)
            load = None if loads is None else loads[expert]
            shares.append(
                ExpertShare(**vars(share), layer=layer, module=module, expert=expert, scored=count > 0, load=load)
            )
    return shares


def _counts_by_expert(mask: SafetyMask) -> tuple[dict[str, Counter[str]], dict[str, Counter[str]]]:
    """Return how many weights of each expert were scored, and how many are selected, by module and expert."""
    weights: dict[str, Counter[str]] = {}
    selected: dict[str, Counter[str]] = {}
    patterns = expert_patterns(mask)
    for name, shape in mask.shapes.items():
        place = expert_place(name, shape, patterns)
        if place is None:
            continue
        missing = mask.unscored.get(name, {})
        if place.expert is None:
            size = math.prod(shape[1:])
            counts = {str(number): size - missing.get(number, 0) for number in range(shape[0])}
            chosen = dict(zip(counts, selected_by_expert(mask.indices[name], shape), strict=True))
        else:
            counts = {place.expert: math.prod(shape) - missing.get(0, 0)}
            chosen = {place.expert: mask.indices[name].numel()}
        weights.setdefault(place.module, Counter()).update(counts)
        selected.setdefault(place.module, Counter()).update(chosen)
    return weights, selected


def expert_table(experts: Sequence[ExpertShare]) -> str:
    """Return experts as aligned plain text: each of them where they are few; else by layer, and the most enriched."""
    if len(experts) <= _LISTED:
        return "\n".join(align_numbers(_expert_rows(experts, "layer/expert"))) if experts else ""
    ranked = sorted((one for one in experts if one.enrichment > 0), key=lambda one: -one.enrichment)
    tables = [_layer_rows(experts), _expert_rows(ranked[:_MOST_ENRICHED], "most enriched")]
    return "\n\n".join("\n".join(align_numbers(rows)) for rows in tables if len(rows) > 1)


def expert_summary(mask: SafetyMask) -> str:
    """Return in a few words how many experts were not scored and which hold most of a mask; empty for a dense model."""
    experts = expert_shares(mask)
    if not experts:
        return ""
    unscored = sum(not one.scored for one in experts)
    ranked = sorted((one for one in experts if one.enrichment > 0), key=lambda one: -one.enrichment)
    words = [f"{unscored} of {len(experts)} experts unscored" if unscored else f"{len(experts)} experts"]
    words += [f"enrichment {decimal(one.enrichment)} in {one.group}" for one in ranked[:_SUMMARISED]]
    return ", ".join(words)


def _expert_rows(experts: Sequence[ExpertShare], heading: str) -> list[tuple[str, ...]]:
    measured = any(one.load is not None for one in experts)
    rows = [(heading, *HEADINGS, *(["load"] if measured else []))]
    for one in experts:
        cells = share_cells(one) if one.scored else (one.group, "unscored", *("–" for _ in HEADINGS[1:]))
        rows.append((*cells, *([_load(one)] if measured else [])))
    return rows


def _layer_rows(experts: Sequence[ExpertShare]) -> list[tuple[str, ...]]:
    measured = any(one.load is not None for one in experts)
    spread = ("median", "max")
    rows = [("layer", "experts", "unscored", "min enrichment", *spread, *(("min load", *spread) if measured else ()))]
    for module in dict.fromkeys(one.module for one in experts):
        members = [one for one in experts if one.module == module]
        scored = [one.enrichment for one in members if one.scored]
        loads = [one.load for one in members if one.load is not None]
        cells = [members[0].group.rpartition("/")[0], str(len(members)), str(len(members) - len(scored))]
        cells += [decimal(value) for value in _spread(scored)]
        rows.append((*cells, *(percent(value) for value in _spread(loads) if measured)))
    return rows


def _spread(values: Sequence[float]) -> tuple[float, float, float]:
    if not values:
        return math.nan, math.nan, math.nan
    return min(values), statistics.median(values), max(values)


def _load(one: ExpertShare) -> str:
    return "–" if one.load is None else percent(one.load)
