# SPDX-License-Identifier: Apache-2.0
"""One page of all studies, rendered from their cells alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from lightning_safety.cli import main
from tests.report.studies.made_up import look


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    cells = tmp_path / "results" / "perturb" / "cells"
    cells.mkdir(parents=True)
    for name in ("before", "0.38/top/0.01"):
        file = cells / f"{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"seconds": 60.0, "machine": "one", **look(5)}), encoding="utf-8")
    (cells.parent / "plan.json").write_text(json.dumps({"before": 60.0, "0.38/top/0.01": 60.0}), encoding="utf-8")
    return tmp_path / "results"


def test_the_page_shows_claims_notes_tables_and_what_was_not_run(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "perturb" / "notes.md").write_text("It does not matter.\n", encoding="utf-8")
    (folder / "notes.md").write_text("So noise is left alone.\n", encoding="utf-8")
    main(["results", str(folder), "-o", str(folder.parent / "RESULTS.md")])
    text = (folder.parent / "RESULTS.md").read_text(encoding="utf-8")
    heading, table, protection = (
        text.index(words) for words in ("## Noise on", "### Noise of 0.38", "## What this does not protect against")
    )
    assert (
        heading
        < text.index("**What the paper says**")
        < text.index("**What we see**: It does not")
        < table
        < text.index("## What follows for the defaults\n\nSo noise is left alone.\n\n## ")
        < protection
    )
    assert "| before |  | 0.10 [0.04, 0.21] n=50 |" in text
    assert "- Subspaces of weights: `lightning-safety study subspaces`" in text
    assert "\n\n\n" not in text
    assert capsys.readouterr().out.strip().endswith("RESULTS.md")


def test_a_study_that_was_run_again_stands_below_it(folder: Path) -> None:
    shutil.copytree(folder / "perturb", folder / "perturb-larger-model")
    shutil.copytree(folder / "perturb", folder / "perturbed")
    (folder / "perturb-larger-model" / "notes.md").write_text("Nor there.\n", encoding="utf-8")
    main(["results", str(folder), "-o", str(folder.parent / "RESULTS.md")])
    headings = [line for line in (folder.parent / "RESULTS.md").read_text("utf-8").splitlines() if line[:3] == "## "]
    noise = "## Noise on safety-critical weights"
    assert headings == [noise, f"{noise}: larger-model", "## Not run", "## What this does not protect against"]


def test_figures_are_found_from_the_page(folder: Path) -> None:
    page = folder.parent / "pages" / "RESULTS.md"
    page.parent.mkdir()
    main(["results", str(folder), "-o", str(page)])
    text = page.read_text(encoding="utf-8")
    assert "![noise-0.38](../results/perturb/noise-0.38.png)" in text
    assert (page.parent / "../results/perturb/noise-0.38.png").exists()


def test_a_folder_without_studies_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["results", str(tmp_path)])
    assert "`folder` expected to hold folders of studies (pattern, perturb" in capsys.readouterr().err
