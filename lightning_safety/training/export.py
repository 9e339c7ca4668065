# SPDX-License-Identifier: Apache-2.0
"""From a Lightning checkpoint to a Hugging Face folder."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_safety.language import canonical_name, load_causal_lm, load_tokenizer, save_language_model
from lightning_safety.training.checkpoint import ADAPTERS_KEY, FILES_KEY, unpack_model
from lightning_safety.training.export_adapters import export_adapters

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def export_checkpoint(
    checkpoint: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    adapter: bool = False,
) -> Path:
    """Write the language model of a Lightning checkpoint as a Hugging Face folder.

    The folder appears whole or not at all. Weights keep the dtype they have in the checkpoint.

    LoRA adapters of a `CausalLanguageModule` are merged into their base, which is loaded again, unquantised, from where
    the fit had it. Weights that `SafetyPreservingAdaptation` held keep the bits of that base. Adapters trained on a
    quantised base are merged into the unquantised one, as is usual: the result differs from the trained model by what
    quantisation had changed, which is not in it.

    Args:
        checkpoint: The ``.ckpt`` file. It is read without running pickled code.
        output: The folder to make.
        base: The model whose architecture and tokenizer the checkpoint has: a hub id, a folder or a known name. Needed
            unless the checkpoint is a `CausalLanguageModule`'s. For adapters: where the base is now.
        adapter: Write the adapters instead of a model: a folder of peft, with the mask of what was held if it needs one
            (then `load_held_adapter` loads it).

    Returns:
        The folder.

    Raises:
        FileNotFoundError: There is no such checkpoint, or the base of its adapters is not found.
        FileExistsError: `output` is there and not empty.
        ValueError: The file is no Lightning checkpoint, needs `base`, holds adapters of another module, none with
            `adapter`, or on another base; or does not hold exactly one model of that architecture (the message lists
            what it holds).
    """
    target = Path(output)
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise FileExistsError(
            f"`output` expected to be a new or empty folder but {str(target)!r} is there. Name another one."
        )
    content = _load_checkpoint(Path(checkpoint))
    weights = {canonical_name(name): value for name, value in content["state_dict"].items()}
    if ADAPTERS_KEY in content:
        export_adapters(content, target, base=base, merge=not adapter)
        return target
    if adapter:
        raise ValueError(
            "`adapter` expected the checkpoint of a CausalLanguageModule with `lora` but this one holds no adapters of"
            " one. Leave `adapter` out to write the whole model."
        )
    foreign = [name for name in weights if "lora_" in name]
    if foreign:
        raise ValueError(
            f"`checkpoint` expected to hold whole weights, or the adapters of a CausalLanguageModule, but holds"
            f" {len(foreign)} adapter weights of another module (such as {foreign[0]!r}). Load that module, then call"
            " `save_held_adapter` or `merge_held_adapter` (`save_pretrained` or `merge_and_unload` if nothing was held)"
            " on its peft model."
        )
    if base is not None:
        model, tokenizer = load_causal_lm(base), load_tokenizer(base)
    elif FILES_KEY in content:
        model, tokenizer = unpack_model(content[FILES_KEY])
    else:
        raise ValueError(
            "`base` expected to name the model that was fine-tuned but got None, and only checkpoints of "
            "CausalLanguageModule hold its configuration and tokenizer. For instance, `base='owner/model'`."
        )
    _load_weights(model, weights)
    save_language_model(model, tokenizer, target)
    return target


def _load_checkpoint(path: Path) -> dict[str, Any]:
    if not path.is_file():
        # Not done here: reading such a folder runs pickled code.
        hint = (
            " It is a folder. If it is a sharded checkpoint of your own, make one file of it with `python -m"
            f" torch.distributed.checkpoint.format_utils dcp_to_torch {path} FILE`, and export that with `base`."
            if path.is_dir()
            else ""
        )
        raise FileNotFoundError(f"`checkpoint` expected to be a file but there is none at {str(path)!r}.{hint}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"`checkpoint` expected to be a Lightning checkpoint of tensors and plain values but {str(path)!r} is "
            f"damaged or holds other objects, which are not loaded: {error!s:.300} If these are hyperparameters, leave "
            f"them out with `save_hyperparameters(ignore=[…])`."
        ) from error
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), Mapping):
        raise ValueError(f"`checkpoint` expected to be a Lightning checkpoint but {str(path)!r} has no `state_dict`.")
    return content


def _load_weights(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> None:
    """Put the weights of the one model in `weights` that fits into `model`."""
    expected = model.state_dict()
    # One of two tied names is enough: Lightning saves both, but a strategy may not.
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    needed = {name: value.shape for name, value in expected.items() if name not in tied}
    first = next(iter(needed))
    found = [name.removesuffix(first) for name in weights if name == first or name.endswith(f".{first}")]
    fitting = [prefix for prefix in found if not any(_misfits(prefix, weights, needed))]
    if len(fitting) != 1:
        raise ValueError(_explain(fitting, found, weights, needed))
    own = {name: weights[fitting[0] + name] for name in expected if fitting[0] + name in weights}
    model.load_state_dict(own, strict=False, assign=True)
    model.tie_weights()


def _misfits(
    prefix: str, weights: Mapping[str, Tensor], needed: Mapping[str, torch.Size]
) -> tuple[list[str], list[str]]:
    """Return the names that are missing under `prefix`, and those of another shape."""
    missing = [name for name in needed if prefix + name not in weights]
    other = [name for name in needed if prefix + name in weights and weights[prefix + name].shape != needed[name]]
    return missing, other


def _explain(
    fitting: list[str], found: list[str], weights: Mapping[str, Tensor], needed: Mapping[str, torch.Size]
) -> str:
    if fitting:
        return f"`checkpoint` expected to hold one language model but it holds {len(fitting)}: {fitting}."
    message = (
        f"`checkpoint` expected to hold a language model of this architecture but it holds {len(weights)} weights "
        f"under {sorted({name.split('.')[0] for name in weights})}. "
    )
    for prefix in found[:1]:
        missing, other = _misfits(prefix, weights, needed)
        message += f"Of the model under {prefix!r}, {len(missing)} weights are missing and {len(other)} have another "
        message += f"shape (such as {(missing + other)[0]!r}). "
    return message + "Check `base`."
