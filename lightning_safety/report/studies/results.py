# SPDX-License-Identifier: Apache-2.0
"""All studies of a folder as one page: what the papers claim beside what was seen."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_safety.files import replace_atomically
from lightning_safety.report.studies import WRITERS, read_study
from lightning_safety.report.studies.reading import PLAN

NOTES = "notes.md"
"""In the folder of a study: what a reader made of its results; shown above them. In that of all: what follows."""

_TEMPLATE = "results.md.jinja"


@dataclass(frozen=True)
class _Study:
    """What a study is about.

    Attributes:
        title: Its heading.
        summary: What it does. Its settings are in the results.
        claim: What the paper says.
    """

    title: str
    summary: str
    claim: str


STUDIES = {
    "pattern": _Study(
        "Where safety-critical weights lie",
        "The weights of highest Expected Safety Impact, against the size of each component and layer. Intervals are"
        " from prompts drawn with replacement, each scored anew.",
        "in dense models, value matrices and middle-layer MLPs hold more than their share"
        " ([2604.08297](https://arxiv.org/abs/2604.08297)).",
    ),
    "perturb": _Study(
        "Noise on safety-critical weights",
        "Gaussian noise on the weights of highest score of a safe model, beside as many at random and those of lowest"
        " score; weights are restored bit for bit after each cell.",
        "noise of 0.38 standard deviations on the top 1 % raises the jailbreak rate, noise on random weights does not"
        " ([2604.08297](https://arxiv.org/abs/2604.08297)).",
    ),
    "enhance": _Study(
        "Safety Enhancement Tuning",
        "Some of the weights train on refusals and, unless the arm says refusals only, on what keeps the model from"
        " refusing everything. The learning rate falls to the last step: an earlier look is at a fit under way.",
        "100 iterations on 1 % of the weights cut the attack success of unaligned models by over half"
        " ([2604.08297](https://arxiv.org/abs/2604.08297)).",
    ),
    "preserve": _Study(
        "Safety Preserving Adaptation, and what keeps more",
        "A safe model is tuned on everyday instructions while some of its weights are held, or refusals rehearsed.",
        "with the top 1 % held, at most one point of safety is lost in 1,000 iterations of instruction tuning"
        " ([2604.08297](https://arxiv.org/abs/2604.08297)).",
    ),
    "subspaces": _Study(
        "Subspaces of weights",
        "Updates by useful, contaminated and purely harmful rows, projected into the leading directions of the"
        " alignment update and out of them, beside random directions of the same number. A matrix that alignment"
        " changed in fewer directions has no more to project on; in one that it did not change, all lies outside.",
        "no subspace governs safety selectively: what moves safety moves usefulness too"
        " ([2505.14185](https://arxiv.org/abs/2505.14185)).",
    ),
    "activations": _Study(
        "Activations",
        "The residual stream at the last token of harmful and of other prompts: mode subspace overlap beside sets drawn"
        " at random, and how well a linear classifier tells the two apart.",
        "harmful and useful prompts activate overlapping subspaces ([2505.14185](https://arxiv.org/abs/2505.14185)).",
    ),
}
"""By the name of the study, in the order of the page."""


def write_results(folder: Path, output: Path) -> str:
    """Render tables and figures of all studies in a folder from their cells, and one page of them all.

    Args:
        folder: Holds a folder for each study that was run, named like the study; for one that was run again on
            something else, like ``preserve-quickstart``.
        output: The page, Markdown; its figures stay in the folders of the studies.

    Returns:
        The page's text.

    Raises:
        FileNotFoundError: There is no study in the folder.
        ModuleNotFoundError: jinja2 is not installed.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    present = {name: found for name in STUDIES if (found := _folders(folder, name))}
    if not present:
        raise FileNotFoundError(
            f"`folder` expected to hold folders of studies ({', '.join(STUDIES)}) but `{folder}` has none. Run one with"
            " `lightning-safety study`."
        )
    environment = Environment(
        loader=PackageLoader("lightning_safety.report.studies", ""),
        undefined=StrictUndefined,
        autoescape=False,  # Markdown of numbers, no HTML
        keep_trailing_newline=True,
        trim_blocks=True,
    )
    text: str = environment.get_template(_TEMPLATE).render(
        folder=folder.name,
        name=output.name,
        studies=[_entry(name, place, output) for name, found in present.items() for place in found],
        conclusions=_notes(folder),
        absent=[{"name": name, "title": STUDIES[name].title} for name in STUDIES if name not in present],
    )
    with replace_atomically(output) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return text


def _notes(folder: Path) -> str:
    path = folder / NOTES
    return path.read_text(encoding="utf-8").strip() if path.exists() else ""


def _folders(folder: Path, name: str) -> list[Path]:
    """Return the folders of a study, that with its own name first."""
    found = [folder / name, *sorted(folder.glob(f"{name}-*"))]
    return [place for place in found if (place / PLAN).exists()]


def _entry(name: str, folder: Path, output: Path) -> dict[str, Any]:
    study = STUDIES[name]
    text = WRITERS[name](read_study(folder), folder)
    # Figures lie beside the study's own page.
    there = Path(os.path.relpath(folder, output.parent)).as_posix()
    return {
        "title": study.title + folder.name.removeprefix(name).replace("-", ": ", 1),
        "summary": study.summary,
        "claim": study.claim,
        "notes": _notes(folder),
        "text": re.sub(r"(!\[[^]]*\]\()", rf"\g<1>{there}/", text).strip(),
    }
