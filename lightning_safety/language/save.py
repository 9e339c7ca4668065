# SPDX-License-Identifier: Apache-2.0
"""Saving a model with its tokenizer as a folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_safety.files import make_folder_atomically

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
    with make_folder_atomically(folder, "folder") as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return Path(folder)
