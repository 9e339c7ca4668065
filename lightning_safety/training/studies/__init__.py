# SPDX-License-Identifier: Apache-2.0
"""Studies: many fits of one model, resumable cell by cell, with a table and a figure of what they found."""

from __future__ import annotations

from collections.abc import Callable

from lightning_safety.training.studies.activations import activations
from lightning_safety.training.studies.cells import Cell, Cells, run_study_cells
from lightning_safety.training.studies.enhance import EnhancementArm, enhance
from lightning_safety.training.studies.pattern import pattern
from lightning_safety.training.studies.perturb import perturb
from lightning_safety.training.studies.preserve import Arm, preserve
from lightning_safety.training.studies.subspaces import subspaces

STUDIES: dict[str, Callable[..., None]] = {
    "pattern": pattern,
    "perturb": perturb,
    "enhance": enhance,
    "preserve": preserve,
    "subspaces": subspaces,
    "activations": activations,
}
"""The studies that have a name; each has a recipe with its defaults."""

__all__ = [
    "STUDIES",
    "Arm",
    "Cell",
    "Cells",
    "EnhancementArm",
    "activations",
    "enhance",
    "pattern",
    "perturb",
    "preserve",
    "run_study_cells",
    "subspaces",
]
