# SPDX-License-Identifier: Apache-2.0
"""Weights that are spread over processes by their first dimension, as FSDP2 does it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from lightning_safety.processes import gather, rank, unannounced, world_size


class ShardedScores(Mapping[str, Tensor]):
    """Scores of which each process holds a part: a run of consecutive entries of every tensor.

    Args:
        parts: By name, this process's entries of each tensor, of the shape it holds; any device.
        shapes: By the same names in the same order, the shapes of the whole tensors.
        starts: By name, the flat index of the first entry that this process holds. Process after process, the parts
            follow each other.
        device: Where processes exchange tensors.
    """

    def __init__(
        self,
        parts: Mapping[str, Tensor],
        shapes: Mapping[str, tuple[int, ...]],
        starts: Mapping[str, int],
        device: torch.device,
    ) -> None:
        self.device = device
        self._parts = dict(parts)
        self.shapes = dict(shapes)
        self.starts = dict(starts)

    def __getitem__(self, name: str) -> Tensor:
        return self._parts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    @property
    def count(self) -> int:
        """Number of scores in all processes."""
        return sum(math.prod(shape) for shape in self.shapes.values())


def sharded_scores(parts: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> ShardedScores:
    """Return scores of this process's parts of sharded weights, in the order of the weights."""
    return ShardedScores(
        {name: parts[name] for name in weights},
        {name: tuple(weight.shape) for name, weight in weights.items()},
        {name: local_start(weight) for name, weight in weights.items()},
        exchange_device(next(iter(weights.values()))),
    )


def exchange_device(weight: Tensor) -> torch.device:
    """Return where the processes that a weight is spread over exchange tensors, wherever FSDP2 keeps its parts."""
    kind = weight.device_mesh.device_type if isinstance(weight, DTensor) else weight.device.type
    if kind in ("cpu", "mps"):
        return torch.device(kind)
    return torch.device(kind, torch.get_device_module(kind).current_device())


def local_part(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor that may be spread over several (a DTensor); shares its memory."""
    # The method is differentiable, and its result a view that must not be changed in place.
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def local_start(tensor: Tensor) -> int:
    """Return the flat index, in the whole tensor, of the first entry that this process holds."""
    if not isinstance(tensor, DTensor) or not tensor.shape:
        return 0
    # Equal runs of rows, as `torch.chunk` makes them; the last processes may have fewer, or none.
    rows = math.ceil(tensor.shape[0] / world_size())
    return min(rank() * rows, tensor.shape[0]) * math.prod(tensor.shape[1:])


def local_indices(indices: Tensor, tensor: Tensor) -> Tensor:
    """Return those of some sorted flat indices that this process holds, counted from its first entry."""
    if not isinstance(tensor, DTensor):
        return indices
    return indices_within(indices, local_start(tensor), local_part(tensor).numel())


def local_span(indices: Tensor, tensor: Tensor) -> slice:
    """Return which of some sorted flat indices are those that this process holds, as positions from and to."""
    if not isinstance(tensor, DTensor):
        return slice(0, indices.numel())
    return span_within(indices, local_start(tensor), local_part(tensor).numel())


def gather_parts(part: Tensor, tensor: Tensor) -> Tensor:
    """Return, on the CPU, values that processes have of what each holds of a tensor: one after another.

    Where the tensor is sharded, every process must call this, and all get the same.

    Args:
        part: 1-D, of this process.
        tensor: The one that the values are of.
    """
    return torch.cat(gather(part.cpu())) if isinstance(tensor, DTensor) else part.cpu()


def indices_within(indices: Tensor, start: int, length: int) -> Tensor:
    """Return those of some sorted indices that lie in a run of entries, counted from its start.

    Example:
        >>> indices_within(torch.tensor([1, 4, 5, 9]), 4, 5)
        tensor([0, 1])
    """
    return indices[span_within(indices, start, length)] - start


def span_within(indices: Tensor, start: int, length: int) -> slice:
    """Return which of some sorted indices lie in a run of entries, as positions from and to."""
    first, last = torch.searchsorted(indices, torch.tensor([start, start + length], device=indices.device)).tolist()
    return slice(first, last)


def reshard(model: nn.Module) -> None:
    """Let go of weights that FSDP2 still holds whole, as after a forward pass without a backward one."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def passes_of_all(model: nn.Module) -> Iterator[None]:
    """Run a sharded model forward in all processes, as often in each, and let go of what that gathered.

    Inside of `together`, none hears of another's error: they may be waiting for its parts, and end when it does.
    Nothing happens where the model is whole.
    """
    if not is_sharded(model.parameters()):
        yield
        return
    try:
        with unannounced():
            yield
    finally:
        reshard(model)


def is_sharded(weights: Iterable[Tensor]) -> bool:
    """Whether any of the weights is spread over processes."""
    return any(isinstance(weight, DTensor) for weight in weights)


def check_shards(weights: Mapping[str, Tensor]) -> None:
    """Refuse weights that are spread over processes in another way than by the first dimension, one after another.

    Raises:
        ValueError: Some are whole and others not, or one is spread otherwise: by tensor parallelism, for instance.
    """
    if not is_sharded(weights.values()):
        return
    for name, weight in weights.items():
        if not isinstance(weight, DTensor):
            raise ValueError(
                f"`model` expected to have all its weights sharded or none but `{name}` is whole. Apply"
                " `fully_shard` to the model too, not only to its layers."
            )
        over_all = weight.device_mesh.mesh.flatten().tolist() == list(range(world_size()))
        if weight.placements != (Shard(0),) or not over_all:
            raise ValueError(
                "`model` expected to be sharded by the first dimension of its weights over all"
                f" {world_size()} processes but `{name}` is {weight.placements} over {weight.device_mesh}. Use"
                " `fully_shard` with data parallelism alone"
                " (`ModelParallelStrategy(data_parallel_size=…, tensor_parallel_size=1)`)."
            )
