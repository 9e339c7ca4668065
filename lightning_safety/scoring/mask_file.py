# SPDX-License-Identifier: Apache-2.0
"""The file format of a mask: one safetensors file, index tensors as data and everything else as JSON in the header."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_safety.files import replace_atomically

REMAKE = "Score the model again, or get an undamaged copy."
_FORMAT = "lightning_safety.mask"
_VERSION = 1
_HEADER_KEYS = ("format", "version", "shapes", "metadata", "fingerprint", "checksum")


def write_mask_file(
    path: str | os.PathLike[str],
    indices: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    metadata: Mapping[str, str],
    fingerprint: str,
) -> None:
    """Write a mask's parts to `path`, atomically.

    Raises:
        OSError: The file cannot be written. An older file stays as it was.
    """
    shapes_text = json.dumps({name: list(shape) for name, shape in shapes.items()})
    metadata_text = json.dumps(dict(metadata))
    header = {
        "format": _FORMAT,
        "version": str(_VERSION),
        "shapes": shapes_text,
        "metadata": metadata_text,
        "fingerprint": fingerprint,
        "checksum": _checksum(indices, shapes_text, metadata_text),
    }
    with replace_atomically(path) as temporary:
        save_file(dict(indices), temporary, metadata=header)


def read_mask_file(
    path: str | os.PathLike[str],
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any], dict[str, str]]:
    """Return the index tensors, shapes, metadata and raw header of a mask file.

    Format, version, JSON and names are checked here. `SafetyMask` checks the values, and `check_mask_file` that the
    file is as it was written.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not a mask, is truncated, incomplete or from a newer version of the format.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"`{file}` expected to be a mask file but there is none. `SafetyMask.save` writes one.")
    try:
        with safe_open(file, framework="pt") as opened:
            header = opened.metadata() or {}
            _check_header(file, header)
            indices = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"`{file}` expected to be a mask in the safetensors format but it cannot be read: {error}."
            f" It may be truncated or another kind of file. {REMAKE}"
        ) from error
    shapes, metadata = _parsed(file, header, "shapes"), _parsed(file, header, "metadata")
    for name in (*shapes, *indices):
        if name not in shapes or name not in indices:
            lacks = "index tensor" if name in shapes else "shape"
            raise ValueError(f"`{file}` expected to hold indices and shape of `{name}` but has no {lacks}. {REMAKE}")
    return indices, shapes, metadata, header


def check_mask_file(
    path: str | os.PathLike[str], header: Mapping[str, str], indices: Mapping[str, Tensor], fingerprint: str
) -> None:
    """Make sure that a file's fingerprint and checksum are those of the mask read from it.

    Raises:
        ValueError: One is not: the file was altered after it was written.
    """
    expected = {
        "fingerprint": fingerprint,
        "checksum": _checksum(indices, header["shapes"], header["metadata"]),
    }
    for key, value in expected.items():
        if header[key] != value:
            raise ValueError(
                f"`{os.fspath(path)}` expected to have the {key} {value[:12]}… but its header says"
                f" {header[key]:.12}…. It was altered after it was written. {REMAKE}"
            )


def _check_header(file: Path, header: Mapping[str, str]) -> None:
    """Refuse other safetensors files, newer versions and incomplete headers."""
    if header.get("format") != _FORMAT:
        raise ValueError(
            f"`{file}` expected to be a mask but it is another kind of safetensors file"
            f" (format {header.get('format')!r}). Pass a file written by `SafetyMask.save`."
        )
    version = header.get("version", "")
    if version != str(_VERSION):
        raise ValueError(
            f"`{file}` expected to be version {_VERSION} of the mask format but got version {version!r:.20}."
            " Update lightning-safety, or score the model again."
        )
    missing = [key for key in _HEADER_KEYS if key not in header]
    if missing:
        raise ValueError(f"`{file}` expected to have {missing} in its header but has not. {REMAKE}")


def _parsed(file: Path, header: Mapping[str, str], key: str) -> dict[str, Any]:
    """Return the JSON object under `key` of the header."""
    try:
        value = json.loads(header[key])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"`{file}` expected to have JSON under `{key}` in its header. {error}. {REMAKE}") from error
    if not isinstance(value, dict):
        raise ValueError(f"`{file}` expected to have a JSON object under `{key}` in its header. {REMAKE}")
    return value


def _checksum(indices: Mapping[str, Tensor], shapes: str, metadata: str) -> str:
    """Return the SHA-256 over the JSON texts and every index tensor, in order."""
    digest = hashlib.sha256(f"{shapes}\n{metadata}\n".encode())
    for index in indices.values():
        digest.update(index.numpy().tobytes())
    return digest.hexdigest()
