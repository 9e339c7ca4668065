# SPDX-License-Identifier: Apache-2.0
"""The selected entries of one parameter, trained in its place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.utils.hooks import RemovableHandle

from lightning_safety.enforcement.entries import gather_entries, scatter_entries
from lightning_safety.enforcement.gradients import dense_gradient, watch_gradient
from lightning_safety.enforcement.optimizers import evaluated_again
from lightning_safety.scoring.shards import local_part

# CPU kernels work on vectors of up to 64 entries, and round what is left at the end of a tensor otherwise (fused AdamW,
# and sums in bfloat16). An entry from the middle of a weight must not become one of these.
_VECTOR = 64


class TrainedTensor:
    """The selected entries of one parameter, and the 1-D parameter in which they are trained (same dtype).

    Of a parameter that FSDP2 shards, each process trains those that it holds, and the 1-D parameter is sharded too: so
    whoever computes a norm of its gradient, for instance, gets that of all processes.

    Args:
        name: Of the parameter.
        parameter: The whole one.
        indices: Flat, of the selected entries that this process holds, on the parameter's device.
        longest: The most that any process holds. The 1-D parameter ends with zeros that have no gradient: up to the
            next multiple of 64, the same in every process.
    """

    def __init__(self, name: str, parameter: torch.nn.Parameter, indices: Tensor, longest: int) -> None:
        self.name = name
        self.parameter = parameter
        self.indices = indices
        self._length = longest + -longest % _VECTOR
        self.compact = torch.nn.Parameter(self.gather(parameter))
        self.hand_on: Callable[[Tensor], None] = self.add_gradient
        self._written = self._version

    @property
    def bytes(self) -> int:
        """Memory of the indices and the 1-D parameter in this process, in bytes."""
        return self.indices.nbytes + local_part(self.compact).nbytes

    @property
    def entries(self) -> Tensor:
        """The selected entries that this process holds, as the optimizer has them: 1-D, not a copy."""
        return self.cut(self.compact)

    @property
    def _version(self) -> int:
        return local_part(self.compact)._version

    def gather(self, tensor: Tensor) -> Tensor:
        """Return the selected entries of a tensor of the parameter's shape, filled up and sharded as the 1-D one."""
        return self.fill_up(gather_entries(tensor, self.indices))

    def fill_up(self, entries: Tensor) -> Tensor:
        """Return values of the selected entries that this process holds in the form of the 1-D parameter."""
        filled = torch.nn.functional.pad(entries, (0, self._length - entries.numel()))
        if not isinstance(self.parameter, DTensor):
            return filled
        return DTensor.from_local(filled, self.parameter.device_mesh, [Shard(0)], run_check=False)

    def cut(self, compact: Tensor) -> Tensor:
        """Return of a tensor in the form of the 1-D parameter what belongs to entries that this process holds."""
        return local_part(compact).detach()[: self.indices.numel()]

    def watch_gradient(self) -> RemovableHandle:
        """Take every gradient that is accumulated."""
        return watch_gradient(self.parameter, self.take_gradient)

    def take_gradient(self) -> None:
        """Add the selected entries of the gradient to that of the 1-D parameter, and free the rest."""
        gradient = dense_gradient(self.name, self.parameter)
        self.parameter.grad = None
        # Lightning's toggle_optimizer switches off the parameters of other optimizers, which are the compact ones.
        if gradient is None or not self.compact.requires_grad:
            return
        if self._version != self._written:
            raise evaluated_again(self.name)
        self.hand_on(self.gather(gradient))

    def add_gradient(self, entries: Tensor) -> None:
        """Add to the gradient of the 1-D parameter."""
        if self.compact.grad is None:
            self.compact.grad = entries
        else:
            self.compact.grad.add_(entries)

    def refresh(self) -> None:
        """Take the values from the whole parameter."""
        with torch.no_grad():
            local_part(self.compact).copy_(local_part(self.gather(self.parameter)))
        self._written = self._version

    def write_back(self) -> None:
        """Write the values into the whole parameter."""
        scatter_entries(self.parameter, self.indices, self.entries)
        self._written = self._version

    def compact_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return an optimizer's state of the whole tensor for its selected entries."""
        return {
            key: self.gather(value) if isinstance(value, Tensor) and value.shape == self.parameter.shape else value
            for key, value in state.items()
        }
