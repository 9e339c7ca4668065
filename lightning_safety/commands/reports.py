# SPDX-License-Identifier: Apache-2.0
"""The page on a run, and that on studies."""

from __future__ import annotations


def report(run: str, compare: list[str] | None = None, output: str | None = None, replies: bool = True) -> None:
    """Write one self-contained HTML page on a run, or on several side by side.

    Args:
        run: A run folder: Lightning's, with `safety.jsonl`, or that of `lightning-safety study`.
        compare: Other run folders; the page then has a column and a curve for each.
        output: The file to write. Default: `safety_report.html` in the run folder.
        replies: Whether the page shows sample replies to harmful prompts. Without them it can be passed on.
    """
    from lightning_safety.report import write_report

    print(write_report(run, compare or (), output, replies=replies))


def results(folder: str, output: str = "RESULTS.md") -> None:
    """Render tables and figures of studies from what their cells found, and one page of them all.

    Args:
        folder: Holds a folder for each study, named like it (`results/pattern`, …).
        output: The page to write, Markdown.
    """
    from pathlib import Path

    from lightning_safety.report.studies.results import write_results

    write_results(Path(folder), Path(output))
    print(output)
