# SPDX-License-Identifier: Apache-2.0
"""Recipes: YAML files that each open with the command that runs them."""

from __future__ import annotations

import shlex
from pathlib import Path

from lightning_safety.arguments import closest

_FOLDER = Path(__file__).parent

__all__ = ["recipe_command", "recipe_names", "recipe_path", "recipe_summary"]


def recipe_names() -> list[str]:
    """Return the names of the recipes, sorted; those of studies begin with ``studies/``."""
    return sorted(path.relative_to(_FOLDER).with_suffix("").as_posix() for path in _FOLDER.rglob("*.yaml"))


def recipe_path(name: str) -> Path:
    """Return the file of a recipe.

    Raises:
        ValueError: There is no recipe of that name; the message gives the closest.

    Example:
        >>> recipe_path("quikstart")
        Traceback (most recent call last):
        ...
        ValueError: `name` expected to be a recipe but got 'quikstart'. Did you mean `quickstart`?
    """
    stem = name.removesuffix(".yaml")
    if stem not in recipe_names():
        raise ValueError(f"`name` expected to be a recipe but got {name!r}. {closest(stem, recipe_names())}")
    return _FOLDER / f"{stem}.yaml"


def recipe_command(name: str) -> list[str]:
    """Return the words of the command that a recipe opens with, its own file in place of its file name.

    What a reader sees on the first line is thereby what `lightning-safety recipes run` runs.
    """
    path = recipe_path(name)
    opening = path.read_text(encoding="utf-8").splitlines()[0].removeprefix("#")
    program, *words = shlex.split(opening)
    if program != "lightning-safety" or path.name not in words:
        raise ValueError(f"{path} expected to open with `# lightning-safety … {path.name}` but opens with {opening!r}.")
    return [str(path) if word == path.name else word for word in words]


def recipe_summary(name: str) -> str:
    """Return the second line of a recipe: what it is for, in one line."""
    return recipe_path(name).read_text(encoding="utf-8").splitlines()[1].removeprefix("#").strip()
