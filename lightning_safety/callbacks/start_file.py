# SPDX-License-Identifier: Apache-2.0
"""The file of start weights and subspaces that a fit is compared with: the first process writes it, all read it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from torch import Tensor

from lightning_safety.callbacks.log import leaves_files, run_folder
from lightning_safety.monitoring.subspace_file import SubspaceFile, file_hash
from lightning_safety.processes import from_first, rank

SUBSPACE_FILE = "safety_subspaces.safetensors"
"""Start weights and reference subspaces, in the run folder."""


@dataclass(frozen=True)
class StartFile:
    """A file of subspaces, open.

    Attributes:
        file: The file.
        sha256: Of its content.
        temporary: The folder that it lies in where a run writes no files; it goes with this object.
    """

    file: SubspaceFile
    sha256: str
    temporary: tempfile.TemporaryDirectory[str] | None = None

    @property
    def state(self) -> dict[str, Any]:
        """Where it is, for a checkpoint."""
        path = None if self.temporary is not None else str(self.file.path.absolute())
        return {"file": path, "sha256": self.sha256}


def write_start_file(
    trainer: pl.Trainer,
    weights: Mapping[str, Tensor],
    bases: Mapping[str, Mapping[str, Tensor]],
    metadata: Mapping[str, str],
) -> StartFile:
    """Write the file of a fit that begins; on every process, of which the first writes.

    Args:
        trainer: The trainer.
        weights: By name.
        bases: By kind and matrix; the first process's count.
        metadata: What the bases are of.

    Raises:
        OSError: It cannot be written, or this process cannot read it.
    """
    temporary, found = None, None
    if rank() == 0:
        if not leaves_files(trainer):
            temporary = tempfile.TemporaryDirectory()
        # The first process alone knows the run folder: loggers of the others may name another.
        path = (run_folder(trainer) if temporary is None else Path(temporary.name)) / SUBSPACE_FILE
        SubspaceFile.write(path, weights, bases, metadata)
        found = path.absolute(), file_hash(path)
    return _open(found, temporary)


def find_start_file(
    trainer: pl.Trainer,
    state: Mapping[str, Any] | None,
    kinds: Sequence[str],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    energy: float,
    monitor: str,
) -> StartFile:
    """Find the file of a fit that is resumed: an update against other start weights would be another number.

    Args:
        trainer: The trainer.
        state: What the checkpoint says of it.
        kinds: The kinds of bases that are needed.
        shapes: The shape of each matrix that is compared.
        energy: The share of energy that the bases must keep.
        monitor: Who asks, for the message.

    Raises:
        OSError: This process cannot read it.
        ValueError: The checkpoint names none, or it is gone, has changed or does not fit.
    """
    if state is None or state["file"] is None:
        raise ValueError(
            f"The checkpoint expected to come from a fit with {monitor} but names no file of start weights: what it"
            " has moved so far cannot be known. Leave the monitor out, or start a new fit."
        )
    found = None
    if rank() == 0:
        # The run folder may have moved.
        places = [Path(state["file"]), run_folder(trainer) / SUBSPACE_FILE]
        path = next((place for place in places if place.is_file()), None)
        if path is None:
            raise ValueError(
                f"The resumed fit's start weights expected to be in {str(places[0])!r} but there is no such file. Put"
                " it back, leave the monitor out, or start a new fit."
            )
        SubspaceFile(path, state["sha256"]).check(kinds, shapes, energy=energy)
        found = path.absolute(), state["sha256"]
    return _open(found)


def _open(found: tuple[Path, str] | None, temporary: tempfile.TemporaryDirectory[str] | None = None) -> StartFile:
    """Open in every process what the first one has found."""
    found = from_first(found)
    assert found is not None
    path, sha256 = found
    if not path.is_file():
        raise FileNotFoundError(
            f"{str(path)!r} expected to be a file that every process reads but process {rank()} sees none. Put the run"
            " folder on storage that all machines share, or leave the monitor out."
        )
    return StartFile(SubspaceFile(path), sha256, temporary)
