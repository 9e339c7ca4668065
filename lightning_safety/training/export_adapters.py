# SPDX-License-Identifier: Apache-2.0
"""From the adapters in a checkpoint to a merged model, or to an adapter's folder."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_safety.enforcement.adapter_files import save_held_adapter
from lightning_safety.enforcement.merge import check_unshared, merge_held_adapter
from lightning_safety.files import make_folder_atomically
from lightning_safety.language import canonical_name, load_causal_lm, save_language_model
from lightning_safety.training.adapters import base_names, check_base, check_loaded, sample_base
from lightning_safety.training.checkpoint import (
    ADAPTERS_FOLDER,
    ADAPTERS_KEY,
    FILES_KEY,
    check_version,
    unpack_files,
    unpack_model,
)
from lightning_safety.training.interventions import held_weights, restore_trained

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MODEL = "model."


def export_adapters(
    content: Mapping[str, Any], target: Path, *, base: str | os.PathLike[str] | None, merge: bool
) -> None:
    """Write what the adapters in a checkpoint make of their base, or the adapters alone.

    Args:
        content: A checkpoint of `ResumableLanguageModule` with adapters.
        target: The folder to make.
        base: Where their base is. None: where the fit loaded it from.
        merge: Whether a whole model is written. The adapters alone need no base.

    Raises:
        FileNotFoundError: The base is not found.
        ValueError: No base is named, it is not the one that was trained on, or the adapters cannot be merged.
    """
    described = check_version(content[ADAPTERS_KEY])
    empty, tokenizer = unpack_model(content[FILES_KEY])
    mask = held_weights(described, content.get("callbacks", {}), acting_only=not merge)
    if merge:
        model = _wrap(_load_base(content, base), content)
        check_base(sample_base(model), described["base"])
        restore_trained(model, described)
        _load_adapters(model, content)
        merged = _merge_whole(model) if mask is None else merge_held_adapter(model, mask)
        merged.generation_config = empty.generation_config
        save_language_model(merged, tokenizer, target)
        return
    model = _wrap(empty, content)
    _check_adapters_alone(model, content)
    _load_adapters(model, content)
    if mask is not None:
        save_held_adapter(model, mask, target)
        return
    with make_folder_atomically(target, "output") as folder:
        model.save_pretrained(folder, save_embedding_layers=False)


def _load_base(content: Mapping[str, Any], base: str | os.PathLike[str] | None) -> PreTrainedModel:
    """Load the base, dense and in the precision of the fit."""
    settings = content["hyper_parameters"]
    source = base if base is not None else settings["source"]
    if not source:
        raise ValueError(
            "`base` expected to name the model that the adapters were trained on but got None, and the fit was given a"
            " model in memory. For instance, `base='owner/model'`."
        )
    if base is None and settings["trust_remote_code"]:
        raise ValueError(
            f"`base` expected to be given because {source!r} comes with Python code of its own, which no checkpoint may"
            " have run. Save that model in a folder whose architecture transformers knows, and pass it."
        )
    gguf_file = settings["gguf_file"] if base is None else None
    return load_causal_lm(source, dtype=settings["dtype"], gguf_file=gguf_file)


def _wrap(model: PreTrainedModel, content: Mapping[str, Any]) -> Any:
    """Return a model, which may be on the meta device, with untrained adapters as a checkpoint describes them."""
    from peft import PeftConfig, get_peft_model

    adapted: Any = None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        unpack_files(content[FILES_KEY], folder)
        for place in sorted((folder / ADAPTERS_FOLDER).iterdir()):
            configuration = PeftConfig.from_pretrained(place)
            # Whoever loads the adapter looks for its base there; peft warns if the model at hand has another name.
            source, configuration.base_model_name_or_path = configuration.base_model_name_or_path, None
            if adapted is None:
                adapted = get_peft_model(model, configuration, adapter_name=place.name)
            else:
                adapted.add_adapter(place.name, configuration)
            configuration.base_model_name_or_path = source or content["hyper_parameters"]["source"] or None
    return adapted


def _weights(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return what a checkpoint holds of the PeftModel, by its names there."""
    names = (name for name in content["state_dict"] if name.startswith(_MODEL))
    return {name.removeprefix(_MODEL): content["state_dict"][name] for name in names}


def _load_adapters(model: Any, content: Mapping[str, Any]) -> None:
    """Give adapters their weights; without memory (on the meta device) they take the checkpoint's."""
    base = base_names(model)
    empty = any(weight.is_meta for weight in model.parameters())
    check_loaded(model.load_state_dict(_weights(content), strict=False, assign=empty), base)
    model.base_model.set_adapter(content[ADAPTERS_KEY]["active"])
    model.eval()


def _check_adapters_alone(model: Any, content: Mapping[str, Any]) -> None:
    """Refuse to write adapters without what else was trained and is no part of peft's files."""
    trained = {canonical_name(name) for name in base_names(model) & _weights(content).keys()}
    trained |= {name for entries in content[ADAPTERS_KEY]["trained"] for name in entries["entries"]}
    if trained:
        raise ValueError(
            f"`adapter` expected a fit that trained adapters alone but it also trained {len(trained)} weights of the"
            f" base (such as `{min(trained)}`), which no adapter's folder holds. Leave `adapter` out to write the"
            " merged model."
        )


def _merge_whole(model: Any) -> PreTrainedModel:
    check_unshared(model)
    merged: PreTrainedModel = model.merge_and_unload(safe_merge=True)
    return merged
