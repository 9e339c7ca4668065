# SPDX-License-Identifier: Apache-2.0
"""A saved model appears whole or not at all."""

from __future__ import annotations

import os

import pytest
from safetensors import SafetensorError

from lightning_safety.language import save_language_model


def test_an_empty_folder_is_filled(tiny_model, tiny_tokenizer, tmp_path):
    (tmp_path / "model").mkdir()
    folder = save_language_model(tiny_model, tiny_tokenizer, tmp_path / "model")
    names = {entry.name for entry in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= names
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_a_new_folder_has_the_usual_permissions(tiny_model, tiny_tokenizer, tmp_path):
    mask = os.umask(0o027)
    try:
        folder = save_language_model(tiny_model, tiny_tokenizer, tmp_path / "runs" / "model")
    finally:
        os.umask(mask)
    assert folder.stat().st_mode & 0o777 == 0o750


def test_what_is_there_is_not_overwritten(tiny_model, tiny_tokenizer, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("mine")
    for name in ("file", "folder"):
        with pytest.raises(FileExistsError, match="expected to be a new or empty folder"):
            save_language_model(tiny_model, tiny_tokenizer, tmp_path / name)
    assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("what", "failure"),
    [
        ("tokenizer", OSError("No space left on device")),
        ("model", SafetensorError("No space left on device (os error 28)")),
    ],
)
def test_a_failure_leaves_nothing(what, failure, tiny_model, tiny_tokenizer, tmp_path, monkeypatch):
    def fail(folder):
        raise failure

    monkeypatch.setattr({"tokenizer": tiny_tokenizer, "model": tiny_model}[what], "save_pretrained", fail)
    with pytest.raises(OSError, match="No space left"):
        save_language_model(tiny_model, tiny_tokenizer, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
