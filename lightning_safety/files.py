# SPDX-License-Identifier: Apache-2.0
"""Writing files and folders so that a kill at any moment leaves the old or the new, never half of it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


@contextmanager
def replace_atomically(path: str | os.PathLike[str], *, mode: int | None = None) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it replaces `path`, on failure it is removed.

    Args:
        path: The file to write. Missing parent folders are made.
        mode: Permission bits of the result, for instance ``0o600``. Default: what the user's umask gives.

    Yields:
        The path to write to. It exists already, empty, with permissions for the owner only.

    Raises:
        OSError: The folder cannot be written or the disk is full. `path` is then as it was before.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> with replace_atomically(folder / "report.json") as temporary:
        ...     _ = temporary.write_text("{}")
        >>> [entry.name for entry in folder.iterdir()]
        ['report.json']
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".partial")
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(_permissions() if mode is None else mode)
        # Without this a power cut after the rename can leave a file of the right name and no content.
        with temporary.open("rb+") as written:
            os.fsync(written.fileno())
        temporary.replace(target)
    except SafetensorError as error:
        # What it raises for a full disk is no OSError.
        raise OSError(f"`{target}` could not be written: {error}. An older file is unchanged.") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def make_folder_atomically(path: str | os.PathLike[str], argument: str) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success it becomes `path`, on failure it is removed.

    Args:
        path: A new or an empty folder. Missing parent folders are made.
        argument: What the caller's argument is called, for the message.

    Yields:
        The folder to write into.

    Raises:
        FileExistsError: `path` is a file or holds something.
        OSError: The folder cannot be written.
    """
    target = Path(path)
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise FileExistsError(
            f"`{argument}` expected to be a new or empty folder but {str(target)!r} is not. Name another."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".partial"))
    try:
        yield temporary
        # mkdtemp makes it the owner's alone; a folder made by `mkdir` is what the user expects.
        target.mkdir(exist_ok=True)
        temporary.chmod(target.stat().st_mode)
        temporary.replace(target)
    except SafetensorError as error:
        raise OSError(f"`{target}` could not be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _permissions() -> int:
    """Return what `open` would have given a new file; mkstemp always gives 0600."""
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask
