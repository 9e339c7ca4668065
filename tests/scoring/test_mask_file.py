# SPDX-License-Identifier: Apache-2.0
"""Mask files: what is written comes back, and whatever else is in a file is refused."""

from __future__ import annotations

import contextlib
import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lightning_safety.scoring import SafetyMask, mask_file

MASK = SafetyMask(
    {
        "z.weight": torch.tensor([0, 2, 7]),
        "empty.weight": torch.tensor([], dtype=torch.int64),
        "a.weight": torch.tensor([1]),
    },
    {"z.weight": (2, 4), "empty.weight": (3, 3), "a.weight": (5,)},
    {"method": "top", "fraction": "0.2", "model": "größe/模型", "note": 'quotes " and\nlines'},
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "mask.safetensors"
    MASK.save(file)
    return file


def header_of(file: Path) -> dict[str, Any]:
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header: dict[str, Any] = json.loads(content[8 : 8 + length])["__metadata__"]
    return header


def rewrite(file: Path, *, tensors: dict[str, Any] | None = None, sign: bool = True, **header: Any) -> None:
    """Write the file again with some of it replaced (a header entry of None: left out), signed as if it were right."""
    indices = {name: load_file(file)[name] for name in MASK.shapes}
    for name, tensor in (tensors or {}).items():
        if tensor is None:
            del indices[name]
        else:
            indices[name] = tensor
    metadata = {**header_of(file), **header}
    if sign and {"shapes", "metadata"} <= {key for key, value in metadata.items() if value is not None}:
        metadata["checksum"] = mask_file._checksum(
            {name: tensor.to(torch.int32) for name, tensor in indices.items()}, metadata["shapes"], metadata["metadata"]
        )
    save_file(indices, file, metadata={key: value for key, value in metadata.items() if value is not None})


def test_comes_back_whole(path: Path) -> None:
    loaded = SafetyMask.load(path)
    assert loaded == MASK
    assert loaded.metadata == MASK.metadata
    assert list(loaded.shapes.items()) == list(MASK.shapes.items())
    assert list(loaded.indices) == list(MASK.indices)
    assert loaded.fingerprint == MASK.fingerprint


def test_a_mask_over_nothing_comes_back(tmp_path: Path) -> None:
    SafetyMask({}, {}).save(tmp_path / "m")
    assert SafetyMask.load(str(tmp_path / "m")) == SafetyMask({}, {})


def test_saving_makes_folders_and_leaves_nothing_else(tmp_path: Path) -> None:
    MASK.save(tmp_path / "new" / "folder" / "mask.safetensors")
    assert [entry.name for entry in (tmp_path / "new" / "folder").iterdir()] == ["mask.safetensors"]


@pytest.mark.parametrize(
    "failure",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_leaves_the_old_file(path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception) -> None:
    before = path.read_bytes()

    def write_half(tensors: Any, file: Path, metadata: Any) -> None:
        Path(file).write_bytes(before[:20])
        raise failure

    monkeypatch.setattr(mask_file, "save_file", write_half)
    with pytest.raises(OSError, match="No space left on device"):
        SafetyMask({}, {}).save(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for missing in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(FileNotFoundError, match=missing.name):
            SafetyMask.load(missing)


def test_every_truncation_is_refused(path: Path) -> None:
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"mask\.safetensors.*(truncated|cannot be read)"):
            SafetyMask.load(path)
    path.write_bytes(content + b"\0")
    with pytest.raises(ValueError, match=r"mask\.safetensors"):
        SafetyMask.load(path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(position=st.integers(0, 10**6), value=st.integers(1, 255))
def test_a_changed_byte_never_gives_another_mask(path: Path, position: int, value: int) -> None:
    MASK.save(path)
    content = bytearray(path.read_bytes())
    content[position % len(content)] ^= value
    path.write_bytes(content)
    loaded = None
    with contextlib.suppress(ValueError):
        loaded = SafetyMask.load(path)
    # JSON has several spellings of the same header.
    assert loaded is None or (loaded == MASK and loaded.metadata == MASK.metadata)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(content=st.binary(max_size=200))
def test_any_other_file_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "other"
    file.write_bytes(content)
    with pytest.raises(ValueError, match="other"):
        SafetyMask.load(file)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (torch.tensor([2, 0], dtype=torch.int32), "`z.weight` expected to be sorted"),
        (torch.tensor([2, 2], dtype=torch.int32), "`z.weight` expected to be sorted"),
        (torch.tensor([-3, 2], dtype=torch.int32), "`z.weight` .* but got -3"),
        (torch.tensor([0, 8], dtype=torch.int32), "`z.weight` .* but got 8"),
        (torch.tensor([2**62]), "`z.weight` .* but got 4611686018427387904"),
        (torch.arange(10_000, dtype=torch.int32), "`z.weight` .* but got 9999"),
        (torch.tensor([0.0, 1.0]), "`z.weight` expected to be a 1-D int32 or int64 tensor but got a 1-D torch.float32"),
        (torch.tensor([1, 2]).bfloat16(), "`z.weight` expected to be a 1-D int32 or int64 tensor"),
        (torch.tensor([[1, 2]], dtype=torch.int32), "`z.weight` expected .* but got a 2-D"),
        (None, "indices and shape of `z.weight` but has no index tensor"),
    ],
)
def test_bad_indices_are_refused(path: Path, index: Any, message: str) -> None:
    rewrite(path, tensors={"z.weight": index})
    with pytest.raises(ValueError, match=rf"(?s){path}.*{message}"):
        SafetyMask.load(path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"format": "pt"}, "another kind of safetensors file"),
        ({"format": None}, "another kind of safetensors file"),
        ({"version": "2"}, "version 1 of the mask format but got version '2'. Update lightning-safety"),
        ({"version": None}, "version 1 of the mask format but got version ''"),
        ({"shapes": None}, r"\['shapes'\] in its header"),
        ({"checksum": None, "sign": False}, r"\['checksum'\] in its header"),
        ({"checksum": "0", "sign": False}, "its header says 0….*altered"),
        ({"fingerprint": "0"}, "expected to have the fingerprint"),
        ({"shapes": "{"}, "JSON under `shapes`"),
        ({"shapes": "[" * 100_000}, "JSON under `shapes`"),
        ({"metadata": "[]"}, "a JSON object under `metadata`"),
        ({"metadata": '{"seed": 3}'}, "map strings to strings"),
        ({"shapes": "{}"}, "indices and shape of `a.weight` but has no shape"),
        ({"shapes": '{"z.weight": [2, 3], "empty.weight": [3, 3], "a.weight": [5]}'}, "`z.weight` .* but got 7"),
        ({"shapes": '{"z.weight": [2, 5], "empty.weight": [3, 3], "a.weight": [5]}'}, "fingerprint"),
        (
            {"shapes": '{"z.weight": [1e400, 1], "empty.weight": [3, 3], "a.weight": [5]}'},
            "Shape of `z.weight` expected",
        ),
        ({"shapes": '{"z.weight": [NaN], "empty.weight": [3, 3], "a.weight": [5]}'}, "Shape of `z.weight` expected"),
        ({"shapes": f'{{"z.weight": [{10**30}], "empty.weight": [3, 3], "a.weight": [5]}}'}, "fewer than 2"),
        ({"shapes": f'{{"z.weight": [{"9" * 5000}], "empty.weight": [3, 3], "a.weight": [5]}}'}, "JSON under `shapes`"),
        ({"shapes": '{"z.weight": "8", "empty.weight": [3, 3], "a.weight": [5]}'}, "Shape of `z.weight` expected"),
    ],
)
def test_bad_headers_are_refused(path: Path, header: dict[str, Any], message: str) -> None:
    rewrite(path, **header)
    with pytest.raises(ValueError, match=rf"(?s){path}.*{message}"):
        SafetyMask.load(path)


def test_a_pickle_is_not_opened(tmp_path: Path) -> None:
    file = tmp_path / "mask.pt"
    torch.save(MASK.state_dict(), file)
    with pytest.raises(ValueError, match=r"mask\.pt.*cannot be read"):
        SafetyMask.load(file)
