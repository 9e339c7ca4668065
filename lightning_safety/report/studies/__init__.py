# SPDX-License-Identifier: Apache-2.0
"""Tables and figures of studies, rendered from what their cells left as JSON."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lightning_safety.report.studies.activations import write_activations
from lightning_safety.report.studies.enhancement import write_enhancement
from lightning_safety.report.studies.pattern import write_pattern
from lightning_safety.report.studies.perturbation import write_perturbation
from lightning_safety.report.studies.preservation import write_preservation
from lightning_safety.report.studies.reading import StudyResults, read_study
from lightning_safety.report.studies.subspaces import write_subspaces

WRITERS: dict[str, Callable[[StudyResults, Path], str]] = {
    "pattern": write_pattern,
    "perturb": write_perturbation,
    "enhance": write_enhancement,
    "preserve": write_preservation,
    "subspaces": write_subspaces,
    "activations": write_activations,
}
"""What writes ``results.md`` and figures into the folder of each study."""

__all__ = ["WRITERS", "StudyResults", "read_study"]
