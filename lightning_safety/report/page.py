# SPDX-License-Identifier: Apache-2.0
"""The report as one HTML page that needs nothing else: no network, no script."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import lightning_safety
from lightning_safety.files import replace_atomically
from lightning_safety.report.colours import DARK, LIGHT
from lightning_safety.report.details import facts, settings
from lightning_safety.report.figures import Heatmap, draw_pictures
from lightning_safety.report.panels import Panel, panels
from lightning_safety.report.run import RunRecord, read_run
from lightning_safety.report.tables import against_chance, sentences, summary_tables
from lightning_safety.report.words import label, number, visible

REPORT_FILE = "safety_report.html"
_TEMPLATE = "page.html.jinja"
_GENERIC = r"log|log-random-mask|version_\d+"  # Names that Lightning and a study give; they say nothing of a run.
_CONTENT_WARNING = (
    "The replies below were written by a language model, many of them to harmful prompts. They may be harmful, "
    "offensive or false. Do not publish them."
)


def check_libraries() -> None:
    """Make sure that what draws and writes the report is installed.

    Raises:
        ModuleNotFoundError: matplotlib or jinja2 is not.
    """
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"The report needs matplotlib and jinja2, but {error.name or error} is not installed."
            " Install them with `pip install 'lightning-safety[report]'`."
        ) from error


def write_report(
    run: str | os.PathLike[str],
    compare: Sequence[str | os.PathLike[str]] = (),
    output: str | os.PathLike[str] | None = None,
    title: str | None = None,
    *,
    replies: bool = True,
) -> Path:
    """Write a page on a run, or on several side by side.

    Args:
        run: A run folder: Lightning's, or that of ``lightning-safety study``.
        compare: Other run folders.
        output: The file to write. Default: ``safety_report.html`` in `run`. Only its owner can read it where it shows
            replies to harmful prompts.
        title: The page's heading. Default: the run's name.
        replies: Whether to show sample replies.

    Returns:
        The file.

    Raises:
        ModuleNotFoundError: matplotlib or jinja2 is not installed.
        FileNotFoundError: A folder does not exist or holds nothing to report.
        OSError: The file cannot be written. An older one stays as it was.
    """
    check_libraries()
    folders = [Path(folder) for folder in (run, *compare)]
    runs = [read_run(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]
    target = Path(run) / REPORT_FILE if output is None else Path(output)
    text = render_page(runs, title, replies=replies)
    private = replies and any(one.check_samples or one.evaluation_samples for one in runs)
    with replace_atomically(target, mode=0o600 if private else None) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return target


def _names(folders: Sequence[Path]) -> list[str]:
    """Return what tells folders apart: their names, or as many folders above them as it takes."""
    parts = [folder.resolve().parts for folder in folders]
    names: list[str] = []
    shortest = 2 if any(re.fullmatch(_GENERIC, one[-1]) for one in parts if one) else 1
    for length in range(shortest, max(map(len, parts)) + 1):
        names = ["/".join(one[-length:]) for one in parts]
        if len(set(names)) == len(set(parts)):
            break
    # The same folder twice is two columns all the same.
    counts = [names[:place].count(name) for place, name in enumerate(names)]
    return [f"{name} ({count + 1})" if count else name for name, count in zip(names, counts, strict=True)]


def render_page(runs: Sequence[RunRecord], title: str | None = None, *, replies: bool = True) -> str:
    """Return the page's HTML.

    Args:
        runs: One run, or several to compare.
        title: The heading. Default: the runs' names.
        replies: Whether to show sample replies.

    Raises:
        ModuleNotFoundError: matplotlib or jinja2 is not installed.
    """
    check_libraries()
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        # What a macro returns was made visible, and escaped, inside of it.
        finalize=lambda value: visible(value) if isinstance(value, str) and not hasattr(value, "__html__") else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"label": label, "number": number}
    heatmaps = [Heatmap(run.name, name, mask) for run in runs for name, mask in run.masks.items()]
    drawn = [(panel, draw_pictures(panel)) for panel in panels(runs)]
    return environment.get_template(_TEMPLATE).render(
        title=title or f"Safety report: {', '.join(run.name for run in runs)}",
        runs=runs,
        several=len(runs) > 1,
        colours={"light": LIGHT, "dark": DARK},
        tables=summary_tables(runs),
        sentences=[(run, sentences(run)) for run in runs],
        curves=[(panel, picture) for panel, picture in drawn if not _is_about_chance(panel)],
        chance=[(panel, picture) for panel, picture in drawn if _is_about_chance(panel)],
        against_chance=[(run, against_chance(run)) for run in runs],
        heatmaps=[(heatmap, draw_pictures(heatmap)) for heatmap in heatmaps],
        replies=[(run, run.evaluation_samples or run.check_samples) for run in runs] if replies else [],
        content_warning=_CONTENT_WARNING,
        facts=[(run, facts(run)) for run in runs],
        settings=[(run, settings(run)) for run in runs],
        version=lightning_safety.__version__,
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def _is_about_chance(panel: Panel) -> bool:
    """Whether a figure's point is the distance to chance: a metric that has a random control of its own."""
    return any(line.control and line.name.startswith("by chance") for line in panel.lines)
