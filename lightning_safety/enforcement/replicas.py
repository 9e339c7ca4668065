# SPDX-License-Identifier: Apache-2.0
"""Averaging what is left of a gradient over processes that each hold a copy of the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, distributed
from torch.autograd import Variable
from torch.nn.parallel import DistributedDataParallel


class GradientAverage:
    """Averages a few vectors over processes, at the end of every backward pass that reaches one of them.

    Torch's own data parallelism reduces whole gradients, and does so after whoever takes entries out of them has done
    it: the copies of the model would go apart without a word. Every process must make as many backward passes that
    reach a vector. What no process reaches stays without a gradient.

    Args:
        vectors: Those whose gradients these are.
        receive: Called with position and mean, for every vector that some process has reached in a backward pass.
    """

    def __init__(self, vectors: Sequence[Tensor], receive: Callable[[int, Tensor], None]) -> None:
        self._vectors = [vector.detach() for vector in vectors]
        self._receive = receive
        self._fresh: dict[int, Tensor] = {}

    def add(self, position: int, gradient: Tensor) -> None:
        """Take the part of a gradient that this process has just computed; called in a backward pass."""
        if position in self._fresh:
            self._fresh[position].add_(gradient)
        else:
            self._fresh[position] = gradient
        # As torch's own data parallelism does it: nothing else tells that a backward pass is over.
        Variable._execution_engine.queue_callback(self._exchange)

    def _exchange(self) -> None:
        if not self._fresh:
            return
        fresh, self._fresh = self._fresh, {}
        device = self._vectors[0].device
        reached = torch.tensor([float(place in fresh) for place in range(len(self._vectors))], device=device)
        works = [distributed.all_reduce(reached, async_op=True)]
        found: list[tuple[list[int], Tensor]] = []
        for dtype in dict.fromkeys(vector.dtype for vector in self._vectors):
            places = [place for place, vector in enumerate(self._vectors) if vector.dtype == dtype]
            parts = [fresh[place] if place in fresh else torch.zeros_like(self._vectors[place]) for place in places]
            # Divided first: a sum in half precision overflows where a mean does not.
            found.append((places, torch.cat(parts).div_(distributed.get_world_size())))
            works.append(distributed.all_reduce(found[-1][1], async_op=True))
        for work in works:
            work.wait()
        counts = reached.tolist()
        for places, total in found:
            means = torch.split(total, [self._vectors[place].numel() for place in places])
            for place, mean in zip(places, means, strict=True):
                if counts[place]:
                    self._receive(place, mean)


class WithoutExchange:
    """Keeps torch's data parallelism from reducing gradients, until `remove`.

    For good: Lightning says again after every forward pass of manual optimization that they are to be reduced. So the
    class of the wrapper answers, not its attribute.

    Args:
        model: The wrapped model.
    """

    def __init__(self, model: DistributedDataParallel) -> None:
        self._model = model
        self._kind = type(model)
        never = property(lambda _: False, lambda *_: None)
        # What pickles or prints it sees the class it was.
        names = {"__module__": self._kind.__module__, "__qualname__": self._kind.__qualname__}
        model.__class__ = type(self._kind.__name__, (self._kind,), names | {"require_backward_grad_sync": never})

    def remove(self) -> None:
        """Let it reduce gradients again."""
        self._model.__class__ = self._kind
