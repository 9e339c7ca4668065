# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint holds beside weights, so that a Hugging Face folder can be made of it alone."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FILES_KEY = "language_model_files"
"""The checkpoint's key for what `pack_files` returns."""


def pack_files(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
    """Return the files of a Hugging Face folder but for the weights.

    Returns:
        For each file its content, uint8 of shape [bytes]. Tensors, because ``torch.load(weights_only=True)`` reads them
        and some tokenizer files are not text.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer.save_pretrained(folder)
        model.config.save_pretrained(folder)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(folder)
        return {
            path.relative_to(folder).as_posix(): torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }


def unpack_files(files: Mapping[str, Tensor], folder: Path) -> None:
    """Write what `pack_files` returned into `folder`.

    Raises:
        ValueError: A file would lie outside the folder.
    """
    for name, content in files.items():
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"`checkpoint` expected to hold files of one folder but got {name!r}.")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.numpy().tobytes())
