# SPDX-License-Identifier: Apache-2.0
"""Evaluations side by side, for a terminal or a Markdown page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_safety.monitoring.evaluation import SafetyEvaluation

_MISSING = "–"


def comparison_table(columns: Mapping[str, SafetyEvaluation], *, markdown: bool = False) -> str:
    """Return a table with a column for each evaluation and a row for each measure, with intervals and n.

    Args:
        columns: Evaluations by column title, such as ``before``, ``after`` and ``random mask``.
        markdown: Whether to write a Markdown table instead of aligned text.

    Returns:
        The table; below it, judge and prompts, and what was left out.

    Raises:
        ValueError: No columns.
    """
    if not columns:
        raise ValueError("`columns` expected to hold at least one evaluation but it is empty.")
    found = list(columns.values())
    rows = [
        ["", *columns],
        ["attack success", *(str(one.attack_success) for one in found)],
        ["refusal of harmful prompts", *(str(one.refusal) for one in found)],
        ["over-refusal of borderline prompts", *(str(one.over_refusal) for one in found)],
        ["unscored replies", *(str(one.unscored) for one in found)],
        ["refusal margin (nats per token)", *(_show(one.refusal_margin) for one in found)],
        ["perplexity of written answers", *(str(one.perplexity_written or _MISSING) for one in found)],
        ["perplexity of the start model's replies", *(str(one.perplexity_own) for one in found)],
    ]
    table = markdown_table(rows) if markdown else align(rows)
    return "\n".join([*table, "", *_footnotes(found)])


def _show(margin: float | None) -> str:
    return _MISSING if margin is None else f"{margin:+.2f}"


def _footnotes(evaluations: Sequence[SafetyEvaluation]) -> list[str]:
    judges = dict.fromkeys(one.judge for one in evaluations)
    prompts = dict.fromkeys(name for one in evaluations for name in one.prompts.values())
    lengths = dict.fromkeys(str(one.max_new_tokens) for one in evaluations)
    return [
        "Brackets: 95 % intervals; n: replies or examples scored.",
        f"Judge: {', '.join(judges)}, on replies of {', '.join(lengths)} tokens at most.",
        f"Prompts: {', '.join(prompts)}.",
        *dict.fromkeys(note for one in evaluations for note in one.notes),
    ]


def align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table whose columns are aligned; the first row is the heading."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]


def markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table; the first row is the heading."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]
