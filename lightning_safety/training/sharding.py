# SPDX-License-Identifier: Apache-2.0
"""Spreading a language model over processes, layer by layer (FSDP2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

_DATA, _TENSOR = "data_parallel", "tensor_parallel"


def shard_model(model: nn.Module, mesh: DeviceMesh, *, hyperparameters: Mapping[str, Any]) -> None:
    """Shard each of a transformers model's layers, and the model itself, over the processes of a mesh; once.

    Args:
        model: A causal language model of transformers, whole on every process.
        mesh: That of Lightning's `ModelParallelStrategy`.
        hyperparameters: Of the module around it.

    Raises:
        ValueError: The mesh has tensor parallelism, the module has adapters, a quantised base or keeps its start model,
            or the model does not say what its layers are.
    """
    if isinstance(model, FSDPModule):
        return
    if mesh[_TENSOR].size() > 1:
        raise ValueError(
            f"`tensor_parallel_size` expected to be 1 but got {mesh[_TENSOR].size()}: CausalLanguageModule is sharded"
            " by data parallelism alone. Pass `ModelParallelStrategy(data_parallel_size=…, tensor_parallel_size=1)`."
        )
    for name in ("lora", "quantization", "retention_weight"):
        if hyperparameters[name] not in (None, 0):
            raise ValueError(
                f"`{name}={hyperparameters[name]}` expected a strategy that leaves the model whole but got"
                " ModelParallelStrategy. Use DDP or one device, or leave it out."
            )
    kinds = set(getattr(model, "_no_split_modules", None) or ())
    layers = [module for module in model.modules() if type(module).__name__ in kinds]
    if not layers:
        raise ValueError(
            f"`source` expected to be a model that names the classes of its layers (`_no_split_modules`) but"
            f" {type(model).__name__} does not, or has none. Shard it yourself: override `configure_model`."
        )
    for layer in layers:
        fully_shard(layer, mesh=mesh[_DATA])
    fully_shard(model, mesh=mesh[_DATA])
