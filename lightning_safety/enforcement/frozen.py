# SPDX-License-Identifier: Apache-2.0
"""Parameters that nothing trains, taken out of the backward pass: an embedding's gradient is as large as its layer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class FrozenParameters:
    """Parameters without gradient, and a graph that reaches as far down as before.

    Reentrant checkpointing gives no gradient to a block of which no input requires one. So an output that requires
    none any more, because the weights behind it are frozen, is made to require one.

    Args:
        model: Holds the parameters.
        parameters: Those to freeze; the ones that require no gradient already stay as they are.

    Example:
        >>> model = nn.Sequential(nn.Embedding(4, 2), nn.Linear(2, 1))
        >>> frozen = FrozenParameters(model, [model[0].weight])
        >>> model[0](torch.tensor([1])).requires_grad, model[0].weight.requires_grad
        (True, False)
        >>> frozen.remove()
        >>> model[0].weight.requires_grad
        True
    """

    def __init__(self, model: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        frozen = {id(parameter) for parameter in self._parameters}
        self._handles: list[RemovableHandle] = [
            module.register_forward_hook(keep_in_graph)
            for module in model.modules()
            if any(id(parameter) in frozen for parameter in module.parameters(recurse=False))
        ]
        for parameter in self._parameters:
            parameter.requires_grad_(False)

    def remove(self) -> None:
        """Let the parameters require gradients again. A second time it does nothing."""
        for handle in self._handles:
            handle.remove()
        for parameter in self._parameters:
            parameter.requires_grad_(True)
        self._handles, self._parameters = [], []


def keep_in_graph(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Tensor | None:  # noqa: ARG001
    """Make the output of a module require a gradient where it does not: a forward hook."""
    # Compiled code is never checkpointed reentrantly.
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    if not isinstance(output, Tensor) or output.requires_grad or not output.is_floating_point():
        return None
    # The clone is no leaf: the next layer may change it in place.
    return output.detach().requires_grad_(True).clone()
