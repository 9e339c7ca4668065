# SPDX-License-Identifier: Apache-2.0
"""Reading and writing single entries of a tensor by flat index, and comparing them bit by bit."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_safety.language.find import named_weights
from lightning_safety.language.quantized import is_quantized_weight
from lightning_safety.scoring.mask import SafetyMask
from lightning_safety.scoring.shards import check_shards, gather_parts, is_sharded, local_indices, local_part, reshard

_INTEGER_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def gather_entries(tensor: Tensor, indices: Tensor) -> Tensor:
    """Return a copy of the entries of `tensor` at flat (row-major) `indices`.

    Args:
        tensor: Any shape and strides. Of a sharded one, this process's part.
        indices: 1-D, int32 or int64, on the same device.

    Returns:
        1-D, one value per index, dtype of `tensor`, outside the autograd graph.

    Example:
        >>> gather_entries(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([1, 2]))
        tensor([2., 3.])
    """
    flat = local_part(tensor).detach()
    if flat.is_contiguous():
        return flat.view(-1).index_select(0, indices)
    return flat[torch.unravel_index(indices.long(), flat.shape)]


def scatter_entries(tensor: Tensor, indices: Tensor, values: Tensor | float) -> None:
    """Write `values` into `tensor`, in place, at flat (row-major) `indices`.

    Args:
        tensor: Any shape and strides, of a sharded one this process's part; a parameter that requires gradient is
            written outside the autograd graph.
        indices: 1-D, int32 or int64, without duplicates, on the same device.
        values: One value per index in the dtype of `tensor`, or one number for all.
    """
    flat = local_part(tensor).detach()
    # index_copy_ and index_fill_ take int64 only; the copy of int32 indices lives for one tensor at a time.
    indices = indices.long()
    if not flat.is_contiguous():
        flat[torch.unravel_index(indices, flat.shape)] = values
    elif isinstance(values, Tensor):
        flat.view(-1).index_copy_(0, indices, values)
    else:
        flat.view(-1).index_fill_(0, indices, values)


def count_different_bits(left: Tensor, right: Tensor) -> int:
    """Count the entries whose bit patterns differ: NaN equals itself, -0.0 differs from 0.0.

    Args:
        left: Any shape.
        right: Same shape and dtype.

    Example:
        >>> count_different_bits(torch.tensor([0.0, torch.nan]), torch.tensor([-0.0, torch.nan]))
        1
    """
    integer = _INTEGER_OF_SIZE[left.element_size()]
    return int((left.view(integer) != right.view(integer)).sum())


def selected_parameters(
    model: torch.nn.Module, mask: SafetyMask, *, skip_quantized: bool = False, sharded: bool = False
) -> list[tuple[str, torch.nn.Parameter, Tensor]]:
    """Return (name, parameter, flat indices on the parameter's device) of each tensor with a selected entry.

    Args:
        model: The causal language model, or a wrapper of it.
        mask: Selects the entries.
        skip_quantized: Whether to leave out quantised weights, whose entries are packed.
        sharded: Whether the caller deals with weights that FSDP2 spreads over processes. Of such, the indices are those
            of entries that this process holds, counted from its first.

    Raises:
        ValueError: A tensor of the mask is not in the model or has another shape (the message lists close names), is
            quantised and not to be left out, or is sharded where that is not expected, or in another way.
    """
    mask.check_model(model)
    weights = {name: weight for name, weight in named_weights(model).items() if name in mask.indices}
    quantized = {
        name for name, weight in weights.items() if is_quantized_weight(weight) or not weight.is_floating_point()
    }
    selected = [name for name, indices in mask.indices.items() if indices.numel()]
    packed = [name for name in selected if name in quantized]
    if packed and not skip_quantized:
        raise ValueError(
            f"`mask` expected to select floating-point weights but {len(packed)} of its tensors are quantised in the"
            f" model, for instance `{packed[0]}`: their entries are packed and cannot be read or written one by one."
            " Load the model unquantised, for instance with `load_causal_lm(…, dtype=torch.bfloat16)`."
        )
    if is_sharded(weights.values()) and not sharded:
        raise ValueError(
            "`model` expected to hold its weights whole but it is sharded over processes. Do this where the model is"
            " whole: on one device, after the fit."
        )
    check_shards(weights)
    return [
        (name, weights[name], local_indices(mask.indices[name], weights[name]).to(weights[name].device))
        for name in selected
        if name not in quantized
    ]


def snapshot_entries(model: torch.nn.Module, mask: SafetyMask) -> dict[str, Tensor]:
    """Return copies of the selected entries, on the CPU, by tensor name; each 1-D in the dtype of its weight.

    Of a model that FSDP2 shards, every process must call this, and gets those of all.

    Raises:
        ValueError: The mask does not fit the model.
    """
    reshard(model)
    return {
        name: gather_parts(gather_entries(parameter, indices), parameter)
        for name, parameter, indices in selected_parameters(model, mask, sharded=True)
    }
