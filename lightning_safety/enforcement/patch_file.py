# SPDX-License-Identifier: Apache-2.0
"""The file format of a patch: one safetensors file with indices and values; the rest is JSON in the header."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_safety.files import replace_atomically
from lightning_safety.scoring.mask import SafetyMask

if TYPE_CHECKING:
    from lightning_safety.enforcement.patch import SafetyPatch

_FORMAT = "lightning_safety.patch"
_VERSION = "1"
_PARTS = ("indices", "before", "after")
_JSON_KEYS = ("shapes", "mask", "metadata")
_REMEDY = "Get an undamaged copy, or train again."


def write_patch_file(
    path: str | os.PathLike[str],
    mask: SafetyMask,
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Write the parts of a patch to `path`, atomically.

    Raises:
        OSError: The file cannot be written. An older file stays as it was.
    """
    tensors = {
        f"{part}/{name}": tensor
        for part, values in zip(_PARTS, (mask.indices, before, after), strict=True)
        for name, tensor in values.items()
    }
    header = {
        "format": _FORMAT,
        "version": _VERSION,
        "shapes": json.dumps({name: list(shape) for name, shape in mask.shapes.items()}),
        "mask": json.dumps(mask.metadata),
        "metadata": json.dumps(dict(metadata)),
    }
    header["checksum"] = _checksum(tensors, header)
    with replace_atomically(path) as temporary:
        save_file(tensors, temporary, metadata=header)


def read_patch_file(path: str | os.PathLike[str], build: type[SafetyPatch]) -> SafetyPatch:
    """Return the patch in a file, every part checked.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not a patch, is truncated or altered, or from a newer version of the format.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"`{file}` expected to be a patch but there is none. `SafetyPatch.save` writes one.")
    try:
        with safe_open(file, framework="pt") as opened:
            header = opened.metadata() or {}
            _check_header(file, header)
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"`{file}` expected to be a patch in the safetensors format but it cannot be read: {error}."
            f" It may be truncated or another kind of file. {_REMEDY}"
        ) from error
    try:
        patch = _built(header, tensors, build)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"`{file}` is not a valid patch. {error} {_REMEDY}") from None
    if header["checksum"] != _checksum(tensors, header):
        raise ValueError(f"`{file}` was altered after it was written: its checksum does not match. {_REMEDY}")
    return patch


def _check_header(file: Path, header: Mapping[str, str]) -> None:
    """Refuse other safetensors files, newer versions and incomplete headers."""
    if header.get("format") != _FORMAT:
        raise ValueError(
            f"`{file}` expected to be a patch but it is another kind of safetensors file"
            f" (format {header.get('format')!r}). Pass a file written by `SafetyPatch.save`."
        )
    version = header.get("version", "")
    if version != _VERSION:
        raise ValueError(
            f"`{file}` expected to be version {_VERSION} of the patch format but got version {version!r:.20}."
            " Update lightning-safety."
        )
    missing = [key for key in (*_JSON_KEYS, "checksum") if key not in header]
    if missing:
        raise ValueError(f"`{file}` expected to have {missing} in its header but has not. {_REMEDY}")


def _built(header: Mapping[str, str], tensors: Mapping[str, Tensor], build: type[SafetyPatch]) -> SafetyPatch:
    """Return the patch; `SafetyMask` and `SafetyPatch` check shapes, bounds, order, duplicates, sizes and dtypes."""
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in _PARTS}
    for key, tensor in tensors.items():
        part, _, name = key.partition("/")
        if part not in parts or not name:
            raise ValueError(f"It holds `{key}`, which is no part of a patch.")
        parts[part][name] = tensor
    shapes, mask, metadata = (_json_object(header, key) for key in _JSON_KEYS)
    if not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("Its metadata expected to be strings but is not.")
    # The order of the header is that of the model; the file lists its tensors by name.
    indices = {name: parts["indices"][name] for name in shapes if name in parts["indices"]}
    indices |= {name: index for name, index in parts["indices"].items() if name not in indices}
    return build(SafetyMask(indices, shapes, mask), parts["before"], parts["after"], metadata)


def _json_object(header: Mapping[str, str], key: str) -> dict[str, Any]:
    value = json.loads(header[key])
    if not isinstance(value, dict):
        raise ValueError(f"`{key}` in its header expected to be a JSON object but is not.")
    return value


def _checksum(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    """Return the SHA-256 over the JSON texts and the name and bytes of every tensor."""
    digest = hashlib.sha256("\n".join(header[key] for key in _JSON_KEYS).encode())
    for key in sorted(tensors):
        digest.update(f"\n{key}\n{tensors[key].dtype}\n".encode())
        digest.update(tensors[key].contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
