# SPDX-License-Identifier: Apache-2.0
"""All weights of a module in one safetensors file, to put them back bit for bit."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_safety.enforcement.delta_layer import delta_layers
from lightning_safety.files import replace_atomically
from lightning_safety.language.quantized import is_quantized_weight

_NAMES_SHOWN = 5
_BESIDE = ".weight.trained_beside"


def read_weights(module: nn.Module) -> dict[str, Tensor]:
    """Return parameters and persistent buffers by name, shared with the module; tied ones once.

    Quantised weights and what belongs to them are left out: no training changes them, and bitsandbytes packs them anew
    as it pleases. What trains beside them (`SparseDelta`) is there.
    """
    parameters = dict(module.named_parameters(remove_duplicate=False))
    quantised = {name for name, weight in parameters.items() if _is_packed(weight)}
    of_quantised = tuple(f"{name.rpartition('.')[0]}." for name in quantised)
    own = parameters.keys() - quantised | dict(module.named_buffers(remove_duplicate=False)).keys()
    found, seen = {}, set()
    for name, value in module.state_dict().items():
        # What `get_extra_state` returns may be anything.
        if not isinstance(value, Tensor) or (name.startswith(of_quantised) and name not in own):
            continue
        tensor = value.detach()
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if place not in seen or not tensor.numel():
            found[name] = tensor
            seen.add(place)
    return found | {f"{path}{_BESIDE}": acting.trained() for path, acting in delta_layers(module) if acting.quantized}


def _is_packed(weight: Tensor) -> bool:
    return is_quantized_weight(weight) or not (weight.is_floating_point() or weight.is_complex())


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 over names, dtypes, shapes and bytes. A file's own would differ each time it is written."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"\n{name}\n{tensor.dtype}\n{list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_weights(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Write weights to a safetensors file: a kill at any moment leaves the old file or the new one.

    Raises:
        OSError: The file cannot be written. An older file stays as it was.
    """
    with replace_atomically(path) as temporary:
        save_file({name: _alone(tensor) for name, tensor in weights.items()}, temporary)


def load_weights(path: Path, sha256: str) -> dict[str, Tensor] | None:
    """Return the weights in a file if they have this fingerprint; None if others are there, or none."""
    try:
        weights = load_file(path)
    except (SafetensorError, OSError):
        return None
    return weights if fingerprint(weights) == sha256 else None


def restore_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put weights back into a module, and make sure that they are there.

    Raises:
        RuntimeError: The module holds other bits afterwards, or it has changed its tensors since.
    """
    # Not strict: of tied tensors one is there, and quantised ones are not.
    module.load_state_dict(dict(weights), strict=False)
    for path, acting in delta_layers(module):
        if acting.quantized and f"{path}{_BESIDE}" in weights:
            acting.write(weights[f"{path}{_BESIDE}"])
    present = read_weights(module)
    wrong = [name for name in weights if name not in present or not _same_bits(present[name], weights[name])]
    if wrong or len(present) != len(weights):
        names = wrong or sorted(present.keys() - weights.keys())
        shown = ", ".join(f"`{name}`" for name in names[:_NAMES_SHOWN])
        more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
        raise RuntimeError(
            f"The module expected to take back its last good weights but {shown}{more} differ. Its tensors must be the"
            " same during the whole fit, and `load_state_dict` must load what `state_dict` returns."
        )


def _alone(tensor: Tensor) -> Tensor:
    """Return the tensor in memory of its own, which the safetensors format wants."""
    tensor = tensor.cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    first, second = (tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(first, second)
