# SPDX-License-Identifier: Apache-2.0
"""Finding the tokenizer that belongs to a model."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from lightning_safety.language.load import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FIX = "Pass `tokenizer=`: a tokenizer, or the folder or hub id of one."


def find_tokenizer(
    tokenizer: PreTrainedTokenizerBase | str | os.PathLike[str] | None = None,
    *,
    module: object = None,
    datamodule: object = None,
    model: object = None,
) -> PreTrainedTokenizerBase:
    """Find a tokenizer: the one given, else the module's, the data module's, or the one saved with the model.

    Args:
        tokenizer: A tokenizer, or what `load_tokenizer` takes (a hub id may be downloaded: it was asked for).
        module: An object whose attribute ``tokenizer`` counts, such as a LightningModule.
        datamodule: Another one.
        model: The causal language model. What it was loaded from, ``model.name_or_path`` (a folder, a GGUF file, a hub
            id in the local cache), is looked up on this machine only: nothing is downloaded.

    Returns:
        The first found, in the order of the arguments.

    Raises:
        ValueError: There is none; the message says where it was looked for.
        TypeError: What was found is no tokenizer.
    """
    owners = {"module": module, "datamodule": datamodule}
    places = {"`tokenizer`": tokenizer} | {
        f"`{name}.tokenizer`": getattr(owner, "tokenizer", None) for name, owner in owners.items() if owner is not None
    }
    for place, found in places.items():
        if found is not None:
            return _as_tokenizer(found, place)
    source = getattr(model, "name_or_path", None)
    if not source:
        nameless = "" if model is None else "; the model does not say what it was loaded from"
        raise ValueError(f"A tokenizer expected but none found in {', '.join(places)}{nameless}. {_FIX}")
    try:
        return load_tokenizer(source, local_files_only=True)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(
            f"A tokenizer expected but none found in {', '.join(places)} or on this machine for the model {source!r}. "
            f"{_FIX} ({error})"
        ) from error


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token to pad with: the padding token, else the end of text. Padding never carries a label.

    Raises:
        ValueError: The tokenizer has neither.
    """
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return int(token_id)
    raise ValueError(
        "`tokenizer` expected to have a padding or an end-of-text token but has neither. "
        'Set one, for instance `tokenizer.pad_token = "<|endoftext|>"`.'
    )


def _as_tokenizer(found: Any, place: str) -> PreTrainedTokenizerBase:
    if isinstance(found, str | os.PathLike):
        return load_tokenizer(found)
    if not callable(getattr(found, "apply_chat_template", None)):
        raise TypeError(f"{place} expected to be a tokenizer of transformers but got {type(found).__name__}. {_FIX}")
    tokenizer: PreTrainedTokenizerBase = found
    return tokenizer
