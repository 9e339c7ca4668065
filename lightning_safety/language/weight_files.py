# SPDX-License-Identifier: Apache-2.0
"""Reading a checkpoint's weights part by part from safetensors files, so that no model is ever in memory whole."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_safety.arguments import closest

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_HEAD = "lm_head.weight"
SETTINGS = (".json", ".jinja", ".model", ".txt")
"""Endings of the files beside the weights: configuration, tokenizer, chat template."""


class WeightFiles:
    """The weights of a checkpoint in safetensors files, read when they are asked for.

    Files are opened for one read at a time, so that what was read does not stay mapped into memory.

    Args:
        source: A folder with ``model.safetensors`` or its shards and their index, one ``.safetensors`` file, or a hub
            id, of which the index, the shards that it names (or the single file) and the configuration are downloaded.
        settings: Whether to download a hub id's settings and tokenizer too.

    Attributes:
        name: What messages call the checkpoint.
        shapes: The shape of each floating-point tensor, by name.

    Raises:
        FileNotFoundError: There are no safetensors files, or a shard of the index is missing.
        ValueError: A file is truncated or no safetensors file, a shard lacks a tensor of the index, or the index names
            files elsewhere.
    """

    def __init__(self, source: str | os.PathLike[str], *, settings: bool = False) -> None:
        self.name = os.fspath(source)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._file_of: dict[str, Path] = {}
        self.folder, files, index = _find_files(self.name, settings)
        for file in files:
            self._scan(file)
        lost = sorted(set(index) - set(self._file_of))
        if lost:
            raise ValueError(
                f"{self.name!r} expected to hold `{lost[0]}` in {index[lost[0]]} but that file lacks it (and "
                f"{len(lost) - 1} more). Download the checkpoint again."
            )

    def _scan(self, file: Path) -> None:
        with _open(file) as handle:
            for name in handle.keys():  # noqa: SIM118
                part = handle.get_slice(name)
                self._file_of[name] = file
                if part.get_dtype() in ("F64", "F32", "F16", "BF16"):
                    self.shapes[name] = tuple(part.get_shape())

    @property
    def ties_head(self) -> bool:
        """Whether the configuration says that the output head is the embedding."""
        path = self.folder / "config.json"
        return path.is_file() and bool(json.loads(path.read_text(encoding="utf-8")).get("tie_word_embeddings", False))

    def read(self, name: str) -> Tensor:
        """Return a whole tensor, in memory of its own."""
        with _open(self._file_of[name]) as handle:
            tensor: Tensor = handle.get_tensor(name).clone()
        return tensor

    def read_part(self, name: str, part: tuple[slice | int, ...]) -> Tensor:
        """Return part of a tensor: one slice, or one number for the first of three dimensions, for each dimension."""
        with _open(self._file_of[name]) as handle:
            tensor: Tensor = handle.get_slice(name)[part].clone()
        return tensor

    def files(self) -> list[Path]:
        """Return the files, in the order of their names."""
        return sorted(set(self._file_of.values()))

    def names_in(self, file: Path) -> list[str]:
        """Return the names of all tensors in a file, those included that are not floating-point."""
        return [name for name, place in self._file_of.items() if place == file]


def all_names(checkpoints: Sequence[WeightFiles]) -> list[str]:
    """Return the names of the floating-point tensors that any of the checkpoints holds, in order."""
    return list(dict.fromkeys(name for checkpoint in checkpoints for name in checkpoint.shapes))


def common_shapes(
    checkpoints: Sequence[WeightFiles],
    names: Iterable[str] | None = None,
    *,
    advice: str = "Take checkpoints of one model.",
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of tensors that checkpoints of one architecture share.

    An output head that some store and others tie to the embedding is left out.

    Args:
        checkpoints: At least one.
        names: Only these are checked and returned; names that no checkpoint holds are left out. Default: all.
        advice: How the message ends.

    Raises:
        ValueError: A tensor is missing somewhere, or has another shape; the message names tensor and checkpoints.
    """
    first = checkpoints[0]
    wanted = None if names is None else set(names)
    shapes = {}
    for name in all_names(checkpoints):
        if wanted is not None and name not in wanted:
            continue
        lacking = [checkpoint for checkpoint in checkpoints if name not in checkpoint.shapes]
        if name == _HEAD and lacking and all(checkpoint.ties_head for checkpoint in lacking):
            continue
        if lacking:
            having = next(checkpoint for checkpoint in checkpoints if name in checkpoint.shapes)
            raise ValueError(
                f"Checkpoints of one architecture expected but {having.name!r} holds `{name}` and {lacking[0].name!r} "
                f"does not. {closest(name, lacking[0].shapes)} {advice}"
            )
        found = {checkpoint.shapes[name]: checkpoint for checkpoint in checkpoints}
        if len(found) > 1:
            (shape, one), (other_shape, other) = list(found.items())[:2]
            raise ValueError(
                f"Checkpoints of one architecture expected but `{name}` is {shape} in {one.name!r} and {other_shape} "
                f"in {other.name!r}. {advice}"
            )
        shapes[name] = first.shapes[name]
    return shapes


def split_longer_side(shape: tuple[int, int], entries: int) -> Iterator[tuple[slice, slice]]:
    """Yield parts of a matrix of at most about so many entries, cut across its longer side."""
    rows, columns = shape
    longer, shorter = max(shape), min(shape)
    step = max(1, entries // max(1, shorter))
    for start in range(0, longer, step):
        cut = slice(start, min(start + step, longer))
        yield (slice(0, rows), cut) if rows <= columns else (cut, slice(0, columns))


def _find_files(source: str, settings: bool) -> tuple[Path, list[Path], dict[str, str]]:
    """Return a checkpoint's folder, its files, and which file its index says holds each tensor."""
    path = Path(source)
    if path.suffix == ".safetensors" and path.is_file():
        return path.parent, [path], {}
    folder = path if path.exists() else _download(source, settings)
    if folder.is_dir() and (folder / _INDEX).is_file():
        index = _read_index(folder, source)
        files = [folder / name for name in dict.fromkeys(index.values())]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise FileNotFoundError(
                f"{source!r} expected to hold the {len(files)} shards of {_INDEX} but lacks {', '.join(missing)}. "
                "Download the checkpoint again."
            )
        return folder, files, index
    if folder.is_dir() and (folder / _SINGLE).is_file():
        return folder, [folder / _SINGLE], {}
    raise FileNotFoundError(
        f"{source!r} expected to hold {_SINGLE} or {_INDEX} but holds neither. Write another format as a folder first, "
        "for instance with `load_causal_lm(…).save_pretrained(…)`, or a Lightning checkpoint with "
        "`lightning-safety export`."
    )


def _read_index(folder: Path, source: str) -> dict[str, str]:
    """Return which file holds each tensor."""
    index: dict[str, str] = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"]
    for file in dict.fromkeys(index.values()):
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(f"{source!r} expected an index of .safetensors files beside it but it names {file!r}.")
    return index


def _download(source: str, settings: bool) -> Path:
    """Return the local copy of a hub repository's weights and configuration.

    Repositories may hold the weights several times, so the index comes first, and then what it names.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    top = [f"*{ending}" for ending in SETTINGS] if settings else [_INDEX, "config.json"]
    try:
        folder = Path(snapshot_download(source, allow_patterns=top, ignore_patterns=["*/*"]))
        shards = _read_index(folder, source).values() if (folder / _INDEX).is_file() else [_SINGLE]
        patterns = [glob.escape(file) for file in dict.fromkeys(shards)]
        # The folder of a snapshot is called by its commit: the same one, if the repository changes meanwhile.
        snapshot_download(source, revision=folder.name, allow_patterns=patterns)
    except HFValidationError as error:
        raise FileNotFoundError(f"{source!r} expected to be a folder, a .safetensors file or a hub id.") from error
    except (HfHubHTTPError, OSError) as error:
        raise FileNotFoundError(
            f"{source!r} is no folder or file, and could not be loaded from the hub: {error}"
        ) from error
    return folder


def _open(file: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{str(file)!r} expected to be a whole safetensors file but is not: {error}") from error
