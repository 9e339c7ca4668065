# SPDX-License-Identifier: Apache-2.0
"""How much of a mask lies in a group of weights, and aligned tables of such shares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_safety.scoring.mask import SafetyMask

HEADINGS = ("weights", "selected", "share", "enrichment")
"""Of the columns of `share_cells`."""


@dataclass(frozen=True)
class GroupShare:
    """How much of a mask lies in one group of weights.

    Attributes:
        group: The group's name: a component, a layer or an expert.
        weights: Scored weights in the group.
        selected: Selected weights in the group.
        share: The group's share of all selected weights, in [0, 1]; NaN if nothing is selected at all.
        enrichment: That share over the group's share of all scored weights: 1 where the group holds as many as a random
            mask would, 2 where it holds twice as many. NaN if nothing in the group was scored.
    """

    group: str
    weights: int
    selected: int
    share: float
    enrichment: float


def group_share(group: str, weights: int, selected: int, mask: SafetyMask) -> GroupShare:
    """Return the share of a group with so many scored and selected weights of `mask`."""
    share = selected / mask.count if mask.count else math.nan
    enrichment = share * mask.scored / weights if weights else math.nan
    return GroupShare(group, weights, selected, share, enrichment)


def share_cells(group: GroupShare) -> tuple[str, ...]:
    """Return one row of a table: the group's name, then a text for each of `HEADINGS`."""
    return (
        group.group,
        f"{group.weights:,}",
        f"{group.selected:,}",
        percent(group.share),
        decimal(group.enrichment),
    )


def percent(share: float) -> str:
    """Return a share as a percentage, a dash where there is none.

    Example:
        >>> percent(0.125), percent(math.nan)
        ('12.5 %', '–')
    """
    return "–" if math.isnan(share) else f"{100 * share:.1f} %"


def decimal(value: float) -> str:
    """Return a number with two decimals, a dash where there is none."""
    return "–" if math.isnan(value) else f"{value:.2f}"


def align_numbers(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Return the lines of a table: names on the left, numbers on the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
