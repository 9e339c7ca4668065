# SPDX-License-Identifier: Apache-2.0
"""Where the selected weights are, read from mask files or from what `SafetyReport` wrote down of masks in memory."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from lightning_safety.scoring import SafetyMask
from lightning_safety.scoring.describe import MaskDescription, ordered_components, ordered_layers
from lightning_safety.scoring.shares import GroupShare

_KEYS = ("layer", "component", "weights", "selected")


def mask_entry(mask: SafetyMask, name: str) -> dict[str, Any]:
    """Return what ``run.json`` holds of a mask: weights, selected ones and enrichment by layer and component.

    Args:
        mask: The mask.
        name: Who holds or trains its weights.
    """
    description = mask.describe()
    cells = [
        {
            "layer": layer,
            "component": component,
            "weights": cell.weights,
            "selected": cell.selected,
            "enrichment": None if math.isnan(cell.enrichment) else cell.enrichment,
        }
        for (layer, component), cell in description.cells.items()
    ]
    return {"name": name, "mask": description.mask, "metadata": dict(mask.metadata), "cells": cells}


def read_mask_files(folders: list[Path], notes: list[str]) -> dict[str, MaskDescription]:
    """Return the description of each ``mask*.safetensors`` by the file's name.

    Args:
        folders: Where to look; the first that has any counts.
        notes: Files that are no valid mask are named here.
    """
    files = next((found for found in (sorted(folder.glob("mask*.safetensors")) for folder in folders) if found), [])
    described = {}
    for file in files:
        try:
            described[file.name] = SafetyMask.load(file).describe()
        except (OSError, ValueError) as error:
            notes.append(f"{file.name} is left out: {error}".replace(str(file), file.name))
    return described


def read_mask_entries(entries: object) -> dict[str, MaskDescription]:
    """Return the description of each mask in ``run.json`` by the callback's name; what does not fit is left out."""
    described = {}
    for entry in entries if isinstance(entries, list) else []:
        cells = entry.get("cells") if isinstance(entry, dict) else None
        if isinstance(cells, list) and cells and all(map(_is_cell, cells)):
            described[str(entry.get("name", "mask"))] = _description(str(entry.get("mask", "")), cells)
    return described


def _is_cell(cell: object) -> bool:
    if not isinstance(cell, dict) or not all(isinstance(cell.get(key), str) for key in _KEYS[:2]):
        return False
    counts = [cell.get(key) for key in _KEYS[2:]]
    return all(isinstance(count, int) and 0 <= count < 2**63 for count in counts)


def _description(title: str, cells: list[dict[str, Any]]) -> MaskDescription:
    """Return the description that these cells are from; shares follow from the counts."""
    weights = sum(cell["weights"] for cell in cells)
    selected = sum(cell["selected"] for cell in cells)

    def group(name: str, members: list[dict[str, Any]]) -> GroupShare:
        size, chosen = (sum(cell[key] for cell in members) for key in _KEYS[2:])
        share = chosen / selected if selected else math.nan
        return GroupShare(name, size, chosen, share, share * weights / size if size else math.nan)

    by = {key: list(dict.fromkeys(cell[key] for cell in cells)) for key in ("layer", "component")}
    return MaskDescription(
        title,
        [
            group(name, [cell for cell in cells if cell["component"] == name])
            for name in ordered_components(by["component"])
        ],
        [group(name, [cell for cell in cells if cell["layer"] == name]) for name in ordered_layers(by["layer"])],
        {(cell["layer"], cell["component"]): group(f"{cell['layer']} {cell['component']}", [cell]) for cell in cells},
    )
