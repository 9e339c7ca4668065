# SPDX-License-Identifier: Apache-2.0
"""Studies: many fits of one model, resumable cell by cell, with a table and a figure of what they found."""

from __future__ import annotations

from lightning_safety.training.studies.cells import Cell, Cells
from lightning_safety.training.studies.preserve import Arm, preserve

__all__ = ["Arm", "Cell", "Cells", "preserve"]
