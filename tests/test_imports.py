# SPDX-License-Identifier: Apache-2.0
"""What an import costs, and which room may import which."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_safety

PACKAGE = Path(lightning_safety.__file__).parent
HEAVY = ("pytorch_lightning", "lightning", "torchmetrics", "transformers", "peft", "datasets", "bitsandbytes", "torch")
LIGHTNING = ("pytorch_lightning", "lightning")
# Who may import whom: only rooms to the left, and itself.
ARROWS = {
    "data": set(),
    "language": {"data"},
    "scoring": {"data", "language"},
    "enforcement": {"data", "language", "scoring"},
    "monitoring": {"data", "language", "scoring"},
    "report": {"data", "language", "scoring", "monitoring"},
}


def imported_by(statement: str, names: tuple[str, ...]) -> list[str]:
    """Return which of `names` a fresh interpreter has imported after `statement`."""
    code = f"{statement}\nimport sys\nprint(*[name for name in {names!r} if name in sys.modules])"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


def imports_of(path: Path) -> set[str]:
    """Return the full names that a file imports anywhere."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_import_of_the_package_is_lazy():
    assert imported_by("import lightning_safety", HEAVY) == []


def test_the_heavy_libraries_can_be_seen_by_this_test():
    assert imported_by("import pytorch_lightning", LIGHTNING) == ["pytorch_lightning"]


@pytest.mark.parametrize("room", sorted(ARROWS))
def test_science_runs_without_lightning(room):
    assert imported_by(f"import lightning_safety.{room}", (*LIGHTNING, "peft", "datasets", "bitsandbytes")) == []


def test_data_runs_without_transformers():
    assert imported_by("import lightning_safety.data", ("transformers",)) == []


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_keeps_to_the_arrows_and_the_length(path):
    imports = imports_of(path)
    room = path.relative_to(PACKAGE).parts[0]
    if room not in ("training", "callbacks", "cli.py"):
        assert not [name for name in imports if name.split(".")[0] in LIGHTNING]
    if room in ARROWS:
        rooms = {name.split(".")[1] for name in imports if name.startswith("lightning_safety.")} & {
            entry.name for entry in PACKAGE.iterdir() if entry.is_dir()
        }
        assert rooms <= ARROWS[room] | {room}
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 300


def test_every_public_name_can_be_imported():
    for name in lightning_safety.__all__:
        assert getattr(lightning_safety, name) is not None
    assert set(lightning_safety.__all__) <= set(dir(lightning_safety))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'SafetyPreservation'"):
        lightning_safety.SafetyPreservation  # noqa: B018


def test_the_doors_at_the_top_lead_into_the_package():
    for name in ("callbacks", "recipes"):
        assert (PACKAGE.parent / name).is_symlink()
        assert (PACKAGE.parent / name).resolve() == PACKAGE / name
