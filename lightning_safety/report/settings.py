# SPDX-License-Identifier: Apache-2.0
"""What a run was made with, as plain values for ``run.json``: trainer, module, callbacks, versions, machine."""

from __future__ import annotations

import dataclasses
import enum
import importlib.metadata
import inspect
import math
import os
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lightning_safety.language import count_weights, find_language_model

RUN_FILE = "run.json"
"""In the run folder, written by `SafetyReport` when a fit starts and again at its end."""

_PACKAGES = ("lightning-safety", "torch", "pytorch-lightning", "lightning", "transformers", "peft", "bitsandbytes")
_TRAINER = (
    "precision",
    "num_devices",
    "num_nodes",
    "max_steps",
    "max_epochs",
    "accumulate_grad_batches",
    "gradient_clip_val",
    "gradient_clip_algorithm",
)
_SECRET_NAME = r"(?:[\w.\-]*[_.\-])?(?:api)?(?:key|token|secret|password|passwd|credentials?)"
_SECRET = re.compile(rf"(?i){_SECRET_NAME}")
_SECRET_LINE = re.compile(rf"(?im)^(\s*(?:-\s+)?{_SECRET_NAME}\s*:[ \t]*)\S.*$")
_LONGEST_TEXT = 200
_LONGEST_LIST = 20


def describe_run(trainer: Any, module: Any, language_model: str | None = None) -> dict[str, Any]:
    """Return what a run is made with: plain values, without secrets and without the user's home folder.

    Args:
        trainer: A trainer.
        module: The module it trains.
        language_model: The dotted name of the language model in the module, where there are several.
    """
    return {
        "trainer": {
            **{name: plain(getattr(trainer, name, None)) for name in _TRAINER},
            "strategy": type(trainer.strategy).__name__,
            "accelerator": type(trainer.accelerator).__name__,
        },
        "module": _describe_module(module, language_model),
        "callbacks": [
            {"class": type(callback).__name__, "arguments": arguments_of(callback)}
            for callback in trainer.callbacks
            if type(callback).__module__.partition(".")[0] == "lightning_safety"
        ],
        "versions": _versions(),
        "machine": _machine(),
    }


def _describe_module(module: Any, language_model: str | None) -> dict[str, Any]:
    try:
        model = find_language_model(module, language_model)
    except ValueError:
        model = module
    return {
        "class": type(module).__name__,
        "model": plain(str(getattr(model, "name_or_path", "") or type(model).__name__)),
        "architecture": type(model).__name__,
        "weights": count_weights(model.parameters()),
    }


def arguments_of(callback: object) -> dict[str, Any]:
    """Return the public attributes of a callback that have plain values; those of a dataclass as if they were its own.

    Example:
        >>> class Callback:
        ...     def __init__(self):
        ...         self.fraction, self.api_key, self.max_new_tokens, self._hook = 0.01, "secret", 24, None
        >>> arguments_of(Callback())
        {'fraction': 0.01, 'max_new_tokens': 24}
    """
    found: dict[str, Any] = {}
    for name, value in vars(callback).items():
        # Lightning puts functions of its own among a callback's attributes.
        if name.startswith("_") or _SECRET.fullmatch(name) or inspect.isroutine(value):
            continue
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            found |= arguments_of(value)
        else:
            found[name] = plain(value)
    return found


def plain(value: object) -> Any:
    """Return a value as JSON can hold it, short: numbers and texts, lists and mappings of such, names of all else."""
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, enum.Enum):
        return plain(value.value)
    if isinstance(value, str | os.PathLike):
        return without_home(os.fspath(value))[:_LONGEST_TEXT]
    if isinstance(value, Mapping):
        pairs = list(value.items())[:_LONGEST_LIST]
        return {str(name): plain(item) for name, item in pairs if not _SECRET.fullmatch(str(name))}
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        # Prompts and answers of the user's own do not belong here.
        if len(value) > _LONGEST_LIST or any(dataclasses.is_dataclass(item) for item in value):
            return f"{len(value)} × {type(value[0]).__name__}"
        return [plain(item) for item in value]
    name = getattr(value, "name", None) or getattr(value, "__name__", None)
    return name if isinstance(name, str) else type(value).__name__


def without_home(text: str) -> str:
    """Return text in which the user's home folder is ``~``."""
    home = str(Path.home())
    return re.sub(rf"{re.escape(home)}(?=$|[/\\])", "~", text) if len(home) > 1 else text


def without_secrets(text: str) -> str:
    r"""Return a YAML file's text without the values of keys, tokens and passwords, and without the home folder.

    Example:
        >>> without_secrets("api_key: abc\nmax_new_tokens: 24\ntokenizer: gpt2\n")
        'api_key: (left out)\nmax_new_tokens: 24\ntokenizer: gpt2\n'
    """
    return without_home(_SECRET_LINE.sub(r"\1(left out)", text))


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _machine() -> dict[str, Any]:
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "accelerators": devices,
    }
