# SPDX-License-Identifier: Apache-2.0
"""Saving a model with its tokenizer as a folder."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def save_language_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | os.PathLike[str]
) -> Path:
    """Write a Hugging Face folder from which `load_causal_lm` and `load_tokenizer` load the same again.

    The folder appears whole or not at all.

    Args:
        model: The causal language model.
        tokenizer: Its tokenizer.
        folder: A new or an empty folder.

    Returns:
        The folder.

    Raises:
        FileExistsError: `folder` is a file or holds something.
        OSError: It cannot be written.
    """
    target = Path(folder)
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise FileExistsError(
            f"`folder` expected to be a new or empty folder but {str(target)!r} is not. Name another."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".partial"))
    try:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        # mkdtemp makes it the owner's alone; a folder made by `mkdir` is what the user expects.
        target.mkdir(exist_ok=True)
        temporary.chmod(target.stat().st_mode)
        temporary.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target
