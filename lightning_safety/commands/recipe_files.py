# SPDX-License-Identifier: Apache-2.0
"""Listing, showing and copying recipes."""

from __future__ import annotations

import shutil
from pathlib import Path

from lightning_safety.recipes import recipe_names, recipe_path, recipe_summary


def recipes_ls() -> None:
    """List the recipes."""
    width = max(map(len, recipe_names()))
    for name in recipe_names():
        print(f"{name:<{width}}  {recipe_summary(name)}")


def recipes_show(name: str) -> None:
    """Print a recipe.

    Args:
        name: The recipe.
    """
    print(recipe_path(name).read_text(encoding="utf-8"), end="")


def recipes_cp(name: str, output: str = ".") -> None:
    """Copy a recipe, to change it and run it by the command that it opens with.

    Args:
        name: The recipe.
        output: A folder or a file; an existing file is not overwritten.
    """
    source = recipe_path(name)
    target = Path(output)
    target = target / source.name if target.is_dir() or not target.suffix else target
    if target.exists():
        raise FileExistsError(f"`output` expected to be free but {target} exists. Remove it or name another file.")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    print(target)
