# SPDX-License-Identifier: Apache-2.0
"""The gradients of weights, frozen and quantised ones too, each handed on as soon as a backward pass has it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_safety.language.quantized import is_quantized_weight


class WeightGradients:
    """Backward passes that hold the gradient of one weight at a time: it is handed on, then freed.

    Dense weights have theirs from autograd. A quantised weight has none there: that of the matrix it stands for is
    grad_outᵀ @ input, formed by hooks from what went into the layer and what comes back to it.

    It acts as a context: inside, dense weights require gradients and hooks are in place; afterwards ``requires_grad``
    is as before and no hook is left. ``.grad`` is never touched, nor are hooks that act on it (DDP, gradient
    accumulation, held weights).

    Args:
        model: Holds the weights.
        weights: Parameters by name: dense ones, and quantised ones of linear layers.
        receive: Called with name and gradient, of the layer's weight shape [out, in], once for each weight that a
            backward pass reaches, all its uses in that pass added up. Float32 for a quantised weight, else in the
            weight's dtype. It must not change the gradient.
        by_layer: Whether the gradient of a weight is formed by hooks. They give the same for the dense weight of a
            linear layer, in float32.
        partly: Whether these are a part of a model's weights on which a loss need not depend: then nothing is handed
            on, where it would be an error.

    Raises:
        ValueError: On entering, if a weight is to be followed by hooks but is not that of a linear layer.

    Example:
        >>> model = nn.Linear(2, 1, bias=False).requires_grad_(False)
        >>> with WeightGradients(model, {"weight": model.weight}, print) as gradients:
        ...     gradients.backward(model(torch.tensor([[1.0, 3.0]])).sum())
        weight tensor([[1., 3.]])
        >>> model.weight.requires_grad
        False
    """

    def __init__(
        self,
        model: nn.Module,
        weights: Mapping[str, nn.Parameter],
        receive: Callable[[str, Tensor], object],
        *,
        by_layer: Callable[[nn.Parameter], bool] = is_quantized_weight,
        partly: bool = False,
    ) -> None:
        self._model = model
        self._receive = receive
        self._partly = partly
        self._followed = {name: weight for name, weight in weights.items() if by_layer(weight)}
        self._dense = {name: weight for name, weight in weights.items() if name not in self._followed}
        self._context = ExitStack()
        self._running = False
        self._leaves: list[Tensor] = []
        self._uses: Counter[str] = Counter()
        self._parts: dict[str, Tensor] = {}

    def __enter__(self) -> Self:
        with ExitStack() as context:
            for name, weight in self._dense.items():
                if not weight.requires_grad:
                    weight.requires_grad_(True)
                    context.callback(weight.requires_grad_, False)
                context.callback(_watch(weight, partial(self._pass_on, name)).remove)
            for name, layer in self._layers():
                hook = layer.register_forward_hook(partial(self._follow, name), with_kwargs=True)
                context.callback(hook.remove)
            for module in self._model.modules():
                if isinstance(module, nn.Embedding):
                    context.callback(module.register_forward_hook(_keep_in_graph).remove)
            self._context = context.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._forget()
        self._context.close()

    def backward(self, loss: Tensor) -> None:
        """Hand over the gradient of `loss` for each weight that it depends on.

        Args:
            loss: A scalar, computed inside the context since the last backward pass.

        Raises:
            RuntimeError: It does not depend on the weights, unless they are `partly` a model's, the model uses
                reentrant gradient checkpointing, or the input of a quantised layer was changed in place.
        """
        wanted = [*self._dense.values(), *self._leaves]
        if not loss.requires_grad or not wanted:
            if self._partly:
                self._forget()
                return
            raise has_no_gradient()
        if _has_reentrant_checkpoint(loss):
            raise RuntimeError(
                "Reentrant gradient checkpointing hides the weights inside of it from gradients by weight. Turn it off"
                " while scoring, or use the non-reentrant one (`use_reentrant=False`)."
            )
        self._running = True
        try:
            torch.autograd.grad(loss, wanted, allow_unused=True)
            # A use that is no part of the loss never comes back.
            for name in list(self._parts):
                self._receive(name, self._parts.pop(name))
        finally:
            self._running = False
            self._forget()

    def _pass_on(self, name: str, gradient: Tensor) -> Tensor | None:
        """Hand over the gradient of a dense weight."""
        if not self._running:
            return None
        self._receive(name, gradient)
        # What a hook returns is what autograd keeps until the end of the pass: one number in place of a matrix.
        return gradient.new_zeros(()).expand_as(gradient)

    def _follow(
        self,
        name: str,
        layer: nn.Module,  # noqa: ARG002
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Tensor,
    ) -> Tensor | None:
        """Remember what went into a layer until the gradient of what came out is known."""
        if not torch.is_grad_enabled():
            return None
        # Autograd computes gradients only on the way to something that is asked for. This is, and adds nothing.
        leaf = output.new_zeros(()).requires_grad_(True)
        output = output + leaf
        # During a backward pass, checkpointing computes the layer again; its first output is the one that counts.
        if not self._running:
            entered = (args[0] if args else next(iter(kwargs.values()))).detach()
            use = _Use(name, entered, entered._version)
            self._leaves.append(leaf)
            self._uses[name] += 1
            _watch(output, partial(self._add_use, use))
        return output

    def _add_use(self, use: _Use, gradient: Tensor) -> None:
        if not self._running or use.entered is None:
            return
        # The graph keeps this hook, not what it needs, until the pass is over.
        entered, use.entered = use.entered, None
        if entered._version != use.version:
            raise RuntimeError(
                f"The input of the layer of `{use.name}` expected to stay as it was until its gradient is known but it"
                " was changed in place. Change a copy of it in the model's code."
            )
        part = _rows(gradient).T @ _rows(entered)
        if use.name in self._parts:
            part += self._parts.pop(use.name)
        self._uses[use.name] -= 1
        if self._uses[use.name]:
            self._parts[use.name] = part
        else:
            self._receive(use.name, part)

    def _layers(self) -> list[tuple[str, nn.Linear]]:
        """Return the layers of the weights that are followed by hooks; a weight may be in several."""
        names = {id(weight): name for name, weight in self._followed.items()}
        # Registered with it: an adapter shows the weight of its base layer as its own.
        weights = [(module._parameters.get("weight"), module) for module in self._model.modules()]
        layers = [
            (names[id(weight)], module)
            for weight, module in weights
            if id(weight) in names and isinstance(module, nn.Linear)
        ]
        missing = set(names.values()) - {name for name, _ in layers}
        if missing:
            raise ValueError(
                f"`weights` expected to hold dense weights and quantised ones of linear layers but `{min(missing)}` is"
                " neither. Leave it out."
            )
        return layers

    def _forget(self) -> None:
        self._leaves.clear()
        self._uses.clear()
        self._parts.clear()


def has_no_gradient() -> RuntimeError:
    """Return the error for a loss that no weight to score has a part in."""
    return RuntimeError(
        "The loss of `objective` does not depend on the weights to score: it has no gradient. Compute it from the"
        " model's output, without `torch.no_grad()` or `.detach()`."
    )


@dataclass
class _Use:
    """What went into a layer, until it is used, and the count of its changes in place at that time."""

    name: str
    entered: Tensor | None
    version: int


def _watch(tensor: Tensor, react: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
    """Call `react` with the gradient of a tensor once autograd has it whole."""
    register: Callable[..., RemovableHandle] = tensor.register_hook
    return register(react)


def _rows(tensor: Tensor) -> Tensor:
    """Return [..., features] as float32 [tokens, features], outside the graph."""
    return tensor.detach().reshape(-1, tensor.shape[-1]).float()


def _keep_in_graph(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:  # noqa: ARG001
    """Make the output of a frozen embedding require a gradient.

    Otherwise reentrant checkpointing above it would leave no trace in the graph by which to refuse it.
    """
    if not torch.is_grad_enabled() or output.requires_grad or not output.is_floating_point():
        return None
    # The clone is no leaf: the next layer may change it in place.
    return output.detach().requires_grad_(True).clone()


def _has_reentrant_checkpoint(loss: Tensor) -> bool:
    """Whether a step of the computation is a reentrant checkpoint: its weights would silently count as unused."""
    found: list[Any] = [loss.grad_fn]
    seen = set()
    while found:
        node = found.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "CheckpointFunctionBackward":
            return True
        found.extend(following for following, _ in node.next_functions)
    return False
