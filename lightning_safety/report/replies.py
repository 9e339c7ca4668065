# SPDX-License-Identifier: Apache-2.0
"""A few replies, each prompt with what the model said at the first check and at the last."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_safety.report.checks import Check, read_lines
from lightning_safety.report.words import shortened

REPLIES_FILE = "safety_replies.jsonl"
SHOWN = {"harmful": 5, "borderline": 3}
"""How many prompts of each kind are shown."""
_LONGEST = 600


@dataclass(frozen=True)
class Answer:
    """A reply.

    Attributes:
        when: The check or evaluation it is from.
        response: What the model said.
        verdicts: What each judge makes of it, in words, by the judge's name.
    """

    when: str
    response: str
    verdicts: dict[str, str]


@dataclass(frozen=True)
class Sample:
    """A prompt and the replies to it, in the order of time."""

    kind: str
    prompt: str
    answers: tuple[Answer, ...]


def replies_of_checks(path: Path, checks: Sequence[Check], notes: list[str]) -> tuple[Sample, ...]:
    """Return samples from the first and the last check of a fit, and from ``validate`` and ``test``.

    Args:
        path: A ``safety_replies.jsonl``; it need not exist.
        checks: The checks that the report shows.
        notes: What the reader should know is added here.
    """
    lines = read_lines(path, notes) if path.is_file() else []
    runs = {(check.run, check.stage) for check in checks}
    found: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        if (str(line.get("run", "")), str(line.get("stage", "fit"))) in runs and isinstance(line.get("step"), int):
            when = f"step {line['step']}" if line.get("stage", "fit") == "fit" else str(line["stage"])
            found.setdefault(when, []).append(line)
    steps = sorted((when for when in found if when.startswith("step ")), key=lambda when: int(when.split()[1]))
    shown = list(dict.fromkeys([*steps[:1], *steps[-1:], *(when for when in found if when not in steps)]))
    return _samples({when: found[when] for when in shown})


def replies_of_evaluations(folder: Path, columns: Iterable[str], notes: list[str]) -> tuple[Sample, ...]:
    """Return samples from the files of replies that a study leaves for each column of its results."""
    files = {name: folder / f"replies-{name.replace(' ', '-')}.jsonl" for name in columns if "/" not in name}
    return _samples({name: read_lines(file, notes) for name, file in files.items() if file.is_file()})


def _samples(lines: Mapping[str, list[dict[str, Any]]]) -> tuple[Sample, ...]:
    answers: dict[tuple[str, str], dict[str, Answer]] = {}
    for when, replies in lines.items():
        for reply in replies:
            prompt, response = reply.get("prompt"), reply.get("response")
            if isinstance(prompt, str) and isinstance(response, str):
                kind = str(reply.get("prompts", "harmful"))
                answer = Answer(when, shortened(response, _LONGEST), _verdicts(kind, reply.get("verdicts")))
                answers.setdefault((kind, prompt), {})[when] = answer
    samples = []
    for shown_kind, count in SHOWN.items():
        prompts = [prompt for kind, prompt in answers if kind == shown_kind]
        for prompt in _spread(prompts, count):
            given = answers[shown_kind, prompt].values()
            samples.append(Sample(shown_kind, shortened(prompt, _LONGEST), tuple(given)))
    return tuple(samples)


def _spread(items: Sequence[str], count: int) -> list[str]:
    """Return at most so many items, evenly spread: no choice by what was replied."""
    count = min(count, len(items))
    return [items[index * len(items) // count] for index in range(count)]


def _verdicts(kind: str, verdicts: object) -> dict[str, str]:
    given = verdicts if isinstance(verdicts, dict) else {}
    return {str(judge): _words(kind, verdict) for judge, verdict in given.items() if isinstance(verdict, dict)}


def _words(kind: str, verdict: dict[str, Any]) -> str:
    harmful, refused = verdict.get("harmful"), verdict.get("refused")
    # Of a harmless prompt only the refusal counts; a judge of refusals calls all other replies harmful.
    said = [("refused" if refused else "not refused")] if isinstance(refused, bool) else []
    if kind == "harmful" and isinstance(harmful, bool):
        said.append("harmful" if harmful else "not harmful")
    return ", ".join(said) or "unscored"
