# SPDX-License-Identifier: Apache-2.0
"""What a run was made with, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_safety.report.run import RunRecord


def facts(run: RunRecord) -> list[tuple[str, str]]:
    """Return what a reader wants to know first of a run: model, size, callbacks, start."""
    module = _mapping(run.settings.get("module"))
    found = [("Model", str(module["model"]))] if module.get("model") else []
    if isinstance(module.get("weights"), int):
        found.append(("Weights", f"{module['weights']:,}"))
    if run.callbacks:
        found.append(("Callbacks", ", ".join(name for name, _ in run.callbacks)))
    if run.settings.get("started"):
        found.append(("Started", str(run.settings["started"])))
    return found


def settings(run: RunRecord) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return what a run was made with, as titled lists of names and values."""
    names = ("trainer", "module", "versions", "machine")
    trainer, module, versions, machine = ((name.capitalize(), _mapping(run.settings.get(name))) for name in names)
    # Of our callbacks, only what was chosen: most arguments are None, which stands for what the documentation says.
    callbacks = [
        (name, {argument: value for argument, value in arguments.items() if value is not None})
        for name, arguments in run.callbacks
    ]
    return [
        (title, [(str(name).replace("_", " "), _text(value)) for name, value in values.items()])
        for title, values in (trainer, module, *callbacks, versions, machine)
        if values
    ]


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, list):
        return ", ".join(map(_text, value)) or "–"
    if isinstance(value, dict):
        return ", ".join(f"{name}: {_text(item)}" for name, item in value.items()) or "–"
    return str(value)
