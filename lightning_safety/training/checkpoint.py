# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint holds beside weights, so that a Hugging Face folder can be made of it alone."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FILES_KEY = "language_model_files"
"""The checkpoint's key for what `pack_files` returns."""

ADAPTERS_KEY = "language_model_adapters"
"""The checkpoint's key for what is said of adapters, beside which it holds no base.

``version``, ``active`` (adapters), ``base`` (`sample_base`), and what `describe_interventions` returns.
"""

ADAPTERS_VERSION = 1

RANDOM_KEY = "random_state"
"""The checkpoint's key for the state of all random number generators."""

ADAPTERS_FOLDER = "adapters"
"""Where `pack_files` puts peft's configuration of each adapter, in a folder of the adapter's name."""


def pack_files(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
    """Return the files of a Hugging Face folder but for the weights.

    Returns:
        For each file its content, uint8 of shape [bytes]. Tensors, because ``torch.load(weights_only=True)`` reads them
        and some tokenizer files are not text.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer.save_pretrained(folder)
        config = copy.deepcopy(model.config)
        adapters: Mapping[str, Any] = getattr(model, "peft_config", None) or {}
        for adapter, configuration in adapters.items():
            configuration.save_pretrained(folder / ADAPTERS_FOLDER / adapter)
            # The base may be loaded in any precision; what it was trained on is among the hyperparameters.
            vars(config).pop("quantization_config", None)
        config.save_pretrained(folder)
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


def unpack_model(files: Mapping[str, Tensor]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the model of `pack_files`, without memory for its weights (on the meta device), and the tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        unpack_files(files, folder)
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
        return model, AutoTokenizer.from_pretrained(folder)


def check_version(described: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what a checkpoint says of its adapters, if this version understands it.

    Raises:
        ValueError: It was written by another version of the package.
    """
    if described.get("version") != ADAPTERS_VERSION:
        raise ValueError(
            f"`checkpoint` expected to hold version {ADAPTERS_VERSION} of adapters but got"
            f" {described.get('version')!r}. Update lightning-safety."
        )
    return described
