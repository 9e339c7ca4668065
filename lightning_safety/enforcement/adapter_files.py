# SPDX-License-Identifier: Apache-2.0
"""Adapters whose training held weights, as folders: peft's files, the mask, and what keeps peft from misleading."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import nn

from lightning_safety.enforcement.adapters import has_adapters, selected_adapted_layers
from lightning_safety.enforcement.held_lora import HeldLora, check_held_by
from lightning_safety.enforcement.merge import check_peft_model
from lightning_safety.files import make_folder_atomically
from lightning_safety.scoring.mask import SafetyMask

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

MASK_FILE = "safety_mask.safetensors"
"""The mask, beside the files of each adapter."""

HELD_KEY = "held_weights_need_lightning_safety_load_held_adapter"
"""The key in ``adapter_config.json`` whose value is `MASK_FILE`.

The name is the message: peft warns of keys it does not know by their names, and ignores them.
"""

_CONFIG_FILE, _WEIGHTS_FILE, _CARD_FILE = "adapter_config.json", "adapter_model.safetensors", "README.md"
_DEFAULT = "default"
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_NAMES_SHOWN = 3
_CARD_NOTE = f"""
> **This adapter was trained while {{count:,}} weights of its base model were held still.** The adapter alone would move
> them: what it adds at these weights (`{MASK_FILE}`) must be left out. Load it with
> `lightning_safety.load_held_adapter(base_model, folder)`, and merge it with `lightning_safety.merge_held_adapter`.
> Loaded with peft alone, it is another model than the one that was trained; peft then warns of `{HELD_KEY}`.
"""


class _Saved(NamedTuple):
    """One adapter in a folder: where it is, and peft's configuration of it."""

    folder: Path
    configuration: PeftConfig


def save_held_adapter(
    model: PeftModel,
    mask: SafetyMask,
    folder: str | os.PathLike[str],
    *,
    save_embedding_layers: bool = False,
) -> Path:
    """Write the LoRA adapters of a model, and the mask without which they are something else, as a folder.

    The folder is the one peft writes (one with the name ``default`` at its top, others in folders of their names), with
    the mask beside each adapter. peft alone still loads it, ignores the mask, and warns: by a key in
    ``adapter_config.json`` whose name says what to call. Other programs may not even warn; give them a merged model.

    The folder appears whole or not at all.

    Args:
        model: What `peft.get_peft_model` or `load_held_adapter` returned, trained.
        mask: The weights that the training held.
        folder: A new or an empty folder.
        save_embedding_layers: Also save the input and output embeddings, for instance with an enlarged vocabulary. peft
            would look it up on the hub by itself.

    Returns:
        The folder.

    Raises:
        TypeError: `model` is no PeftModel with adapters inside of its layers.
        ValueError: The mask does not fit the model, selects no weight with an adapter, or is not the one that the model
            is held by; or an adapter is of a kind that cannot be held.
        FileExistsError: `folder` is a file or holds something.
        OSError: It cannot be written.
    """
    check_peft_model(model)
    mask.check_model(model)
    selected_adapted_layers(model, mask)
    check_held_by(model, mask)
    for name, configuration in model.peft_config.items():
        _check_base_unchanged(name, configuration.init_lora_weights)
    with make_folder_atomically(folder, "folder") as temporary:
        model.save_pretrained(temporary, save_embedding_layers=save_embedding_layers)
        for adapter in _adapter_folders(temporary).values():
            configuration = json.loads((adapter / _CONFIG_FILE).read_text(encoding="utf-8"))
            text = json.dumps(configuration | {HELD_KEY: MASK_FILE}, indent=2, sort_keys=True)
            (adapter / _CONFIG_FILE).write_text(text, encoding="utf-8")
            mask.save(adapter / MASK_FILE)
        _note_on_card(temporary / _CARD_FILE, mask)
    return Path(folder)


def load_held_adapter(
    model: PreTrainedModel, folder: str | os.PathLike[str], *, trainable: bool = False
) -> tuple[PeftModel, HeldLora]:
    """Put the adapters that `save_held_adapter` wrote on their base model, and hold what their training held.

    Args:
        model: The base model, quantised or not. Its layers are wrapped in place.
        folder: What `save_held_adapter` wrote. The first adapter is active (``default``, if there).
        trainable: Whether the active adapter is to be trained further; then with `SafetyPreservingAdaptation` and this
            folder's mask. Else all is frozen and in evaluation mode.

    Returns:
        The model with its adapters, and what holds it: keep it attached.

    Raises:
        FileNotFoundError: There is no such folder, or it lacks adapter, weights or mask.
        ValueError: Adapter or mask do not fit the model, a file is damaged, or the model has adapters already. The
            model is as it was then.
    """
    from peft import get_peft_model

    if has_adapters(model):
        raise ValueError(
            f"`model` expected to be the base model but {type(model).__name__} has adapters already. Load it anew, or"
            " merge them first."
        )
    saved, mask = _read_folder(Path(folder))
    mask.check_model(model)
    device = str(next(model.parameters()).device)
    with _unchanged_on_error(model):
        adapted: Any = None
        for name, (place, configuration) in saved.items():
            configuration.inference_mode = not trainable
            if adapted is None:
                adapted = get_peft_model(model, configuration, adapter_name=name)
            else:
                adapted.add_adapter(name, configuration)
            try:
                result = adapted.load_adapter(place, name, is_trainable=trainable, torch_device=device)
            except (RuntimeError, KeyError) as error:
                raise ValueError(
                    f"`folder` expected to fit the model but adapter {name!r} does not: {error}"
                ) from error
            if result.missing_keys or result.unexpected_keys:
                raise ValueError(
                    f"`folder` expected to fit the model but of adapter {name!r} {len(result.missing_keys)} weights are"
                    f" missing and {len(result.unexpected_keys)} have no place, such as"
                    f" {[*result.missing_keys, *result.unexpected_keys][:_NAMES_SHOWN]}. Load the base model that it"
                    " was trained on."
                )
        if not trainable:
            # peft leaves biases of the base trainable (`bias="all"`).
            adapted.requires_grad_(False)
        return adapted, HeldLora(mask).attach(adapted, continued=True)


def _adapter_folders(folder: Path) -> dict[str, Path]:
    """Return where each adapter of a folder of peft is, by name."""
    inside = {entry.name: entry for entry in sorted(folder.iterdir()) if (entry / _CONFIG_FILE).is_file()}
    return ({_DEFAULT: folder} if (folder / _CONFIG_FILE).is_file() else {}) | inside


def _read_folder(folder: Path) -> tuple[dict[str, _Saved], SafetyMask]:
    """Return the adapters of a folder, every file looked into, and their mask."""
    adapters = _adapter_folders(folder) if folder.is_dir() else {}
    if not adapters:
        found = "has none" if folder.is_dir() else "is no folder"
        raise FileNotFoundError(
            f"`folder` expected to be an adapter that `save_held_adapter` wrote but {str(folder)!r} {found}. Name a"
            " folder on this machine; one from the hub, download first."
        )
    saved = {name: _Saved(place, _read_configuration(name, place)) for name, place in adapters.items()}
    masks = [SafetyMask.load(place / MASK_FILE) for place in adapters.values()]
    if any(mask != masks[0] for mask in masks):
        raise ValueError(
            f"`folder` expected to hold one mask but the adapters {', '.join(adapters)} in {str(folder)!r} have"
            " different ones. Load each from a folder of its own."
        )
    return saved, masks[0]


def _read_configuration(name: str, folder: Path) -> PeftConfig:
    from peft import LoraConfig

    file = folder / _CONFIG_FILE
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        kind = values.get("peft_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"`{file}` expected to be a configuration of peft but it cannot be read: {error}.") from error
    if kind != "LORA":
        raise ValueError(f"`{file}` expected to describe a LoRA adapter but its `peft_type` is {kind!r}.")
    if values.pop(HELD_KEY, None) != MASK_FILE or not (folder / MASK_FILE).is_file():
        raise FileNotFoundError(
            f"`folder` expected to hold the mask of adapter {name!r} but there is no {str(folder / MASK_FILE)!r}, or"
            f" `{_CONFIG_FILE}` does not name it. Copy the whole folder that `save_held_adapter` wrote. An adapter"
            " whose training held nothing is loaded with `peft.PeftModel.from_pretrained`."
        )
    _check_base_unchanged(name, values.get("init_lora_weights"))
    weights = folder / _WEIGHTS_FILE
    try:
        with safe_open(weights, framework="pt") as opened:
            opened.keys()
    except FileNotFoundError:
        raise FileNotFoundError(f"`folder` expected to hold `{_WEIGHTS_FILE}` but {str(folder)!r} has none.") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"`{weights}` is damaged or no safetensors file: {error}. Get an undamaged copy.") from error
    # peft would warn that this model has another name than the one it was trained on, which may be a folder of then.
    return LoraConfig.from_peft_type(**LoraConfig.check_kwargs(**values | {"base_model_name_or_path": None}))


def _check_base_unchanged(adapter: str, initialisation: object) -> None:
    """Refuse ways to begin an adapter that change the base weights: loading would change them again."""
    if isinstance(initialisation, str) and initialisation.startswith(_CHANGE_THE_BASE):
        raise ValueError(
            f"Adapter {adapter!r} expected to leave the base weights as they are but `init_lora_weights="
            f"{initialisation!r}` changes them. Use the default, or merge it with `merge_held_adapter`."
        )


def _note_on_card(file: Path, mask: SafetyMask) -> None:
    """Say what the adapter needs, at the top of the model card, for those who do not see a warning."""
    from huggingface_hub import ModelCard

    card = ModelCard.load(file)
    card.text = _CARD_NOTE.format(count=mask.count) + card.text
    card.save(file)


@contextmanager
def _unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """Take peft's layers out again if putting them in fails."""
    modules = [(module, dict(module._modules), module.training) for module in model.modules()]
    gradients = [(weight, weight.requires_grad) for weight in model.parameters()]
    try:
        yield
    except BaseException:
        for module, children, training in modules:
            module._modules.clear()
            module._modules.update(children)
            module.training = training
        for weight, required in gradients:
            weight.requires_grad_(required)
        model.__dict__.pop("peft_config", None)
        raise
