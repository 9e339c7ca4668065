# SPDX-License-Identifier: Apache-2.0
"""One linear layer of which selected weights train although its weight is frozen, or quantised."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from lightning_safety.enforcement.adapters import adapter_kind
from lightning_safety.enforcement.entries import gather_entries, scatter_entries
from lightning_safety.enforcement.matrix_entries import MatrixEntries, add_sparse_product
from lightning_safety.enforcement.optimizers import evaluated_again
from lightning_safety.language.find import canonical_name
from lightning_safety.language.quantized import dequantized_weight, is_quantized_weight

# The difference that acts on a layer: another training must know of it, and last good weights hold it.
_DELTA = "_lightning_safety_sparse_delta"


class DeltaLayer:
    """The selected weights of one layer, as a parameter of their own.

    A frozen weight holds their values after every step, and a hook hands them their gradient: without that of the whole
    weight. A quantised weight cannot hold them: there the hook adds the product with what they differ by.

    Args:
        name: Canonical name of the weight.
        layer: A linear layer, `Conv1D` or one that bitsandbytes quantised.
        indices: Flat indices of the selected entries in the weight as it is stored, sorted.
        trained: Their values. 1-D, in the order of the indices. Default: those of the weight.
        before: Their values in a frozen weight before any training, alike. Default: those of the weight.
    """

    def __init__(
        self, name: str, layer: nn.Module, indices: Tensor, trained: Tensor | None, before: Tensor | None
    ) -> None:
        self.name = name
        self.layer = layer
        self.ran = False
        weight: Any = layer.weight
        self.quantized = is_quantized_weight(weight)
        self._indices = indices.to(weight.device)
        present = gather_entries(dequantized_weight(layer) if self.quantized else weight, self._indices)
        self.before = (present if before is None or self.quantized else before.to(present.dtype)).cpu()
        shape, flat = _shape(layer), self._indices.long()
        self._order: Tensor | None = None
        if isinstance(layer, Conv1D):
            # It stores [in, out].
            flat, self._order = ((flat % shape[0]) * shape[1] + flat // shape[0]).sort()
        self.entries = MatrixEntries.from_indices(flat, shape)
        if not self.quantized:
            # A gradient takes the rows alone, and places are most of the memory.
            none = flat[:0]
            self.entries = replace(self.entries, column_starts=none, entry_rows=none, by_column=none)
        dtype = torch.promote_types(present.dtype, torch.float32)
        start = self.before if trained is None else trained
        self.values = nn.Parameter(self._laid_out(start.to(weight.device, dtype)).clone())
        self._base = self._laid_out(present) if self.quantized else None
        self._written = self.values._version
        self._handle: RemovableHandle | None = None

    @property
    def bytes(self) -> int:
        """Memory of the values and their places on the device, in bytes."""
        base = 0 if self._base is None else self._base.nbytes
        return self.entries.bytes + self._indices.nbytes + self.values.nbytes + base

    def begin(self) -> None:
        """Act on the layer from here on."""
        self._handle = self.layer.register_forward_hook(self._follow, with_kwargs=True)
        setattr(self.layer, _DELTA, self)
        self.write_through()

    def selects(self, indices: Tensor) -> bool:
        """Whether these are the entries that it trains."""
        return torch.equal(self._indices.cpu(), indices.cpu())

    def trained(self) -> Tensor:
        """Return a copy of the values in the order of the mask's indices: 1-D, float32, or float64 where weights are.

        In a weight of fewer bits they are rounded.
        """
        values = self.values.detach()
        return values.clone() if self._order is None else torch.empty_like(values).index_copy_(0, self._order, values)

    def after(self) -> Tensor:
        """Return the values as the weight has them, in its dtype and on the CPU."""
        return self.trained().to(self.before.dtype).cpu()

    @torch.no_grad()
    def write(self, trained: Tensor) -> None:
        """Give the selected weights other values. 1-D, in the order of the mask's indices."""
        self.values.copy_(self._laid_out(trained.to(self.values)))
        self.write_through()

    def write_through(self) -> None:
        """Write the values into the weight, where it can hold them."""
        self._scatter(self.trained())
        self._written = self.values._version

    @torch.no_grad()
    def refresh(self) -> None:
        """Take the values from the weight, where it holds them."""
        if not self.quantized:
            weight: Any = self.layer.weight
            present = gather_entries(weight, self._indices.to(weight.device))
            self.values.copy_(self._laid_out(present.to(self.values)))
            self._written = self.values._version

    def end(self) -> None:
        """Stop training: a frozen weight holds the values, and what they differ by from a quantised one goes on acting.

        Nothing else is left on the layer.
        """
        self.values.requires_grad_(False)
        self.values.grad = None
        if self._base is None or torch.equal(self.values, self._base.to(self.values.dtype)):
            self.remove()

    @property
    def acts(self) -> bool:
        """Whether it is on the layer."""
        return self._handle is not None

    def remove(self) -> None:
        """Leave the layer alone. A second time it does nothing."""
        if self._handle is not None:
            self._handle.remove()
            delattr(self.layer, _DELTA)
        self._handle = None

    def undo(self) -> None:
        """Leave the layer alone, as it was before the training."""
        if self._handle is not None:
            self._scatter(self.before)
        self.remove()

    def _scatter(self, entries: Tensor) -> None:
        """Write the selected entries of the weight, if it can hold them."""
        if not self.quantized:
            # After a fit Lightning moves the model to the CPU.
            weight: Any = self.layer.weight
            scatter_entries(weight, self._indices.to(weight.device), entries.to(weight))

    # Sparse tensors are beyond the compiler.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _follow(
        self,
        layer: nn.Module,  # noqa: ARG002
        args: tuple[Tensor, ...],
        kwargs: dict[str, Tensor],
        output: Tensor,
    ) -> Tensor | None:
        inputs = args[0] if args else next(iter(kwargs.values()))
        # An expert that no token reached has not run.
        if not inputs.numel():
            return None
        self.ran = True
        if self._base is not None:
            self._move(output.device)
            return add_sparse_product(output, inputs, self.values - self._base, self.entries)
        if not torch.is_grad_enabled() or not self.values.requires_grad:
            return None
        if self.values._version != self._written:
            raise evaluated_again(self.name)
        apply: Any = _GradientOfEntries.apply
        result: Tensor = apply(output, inputs, self.values, self.entries)
        return result

    def _move(self, device: torch.device) -> None:
        """Follow a model that is moved after the fit; an optimizer keeps the parameter."""
        if self.values.device != device and self._base is not None:
            self.values.data = self.values.data.to(device)
            self._base, self._indices = self._base.to(device), self._indices.to(device)
            self._order = None if self._order is None else self._order.to(device)
            self.entries = self.entries.to(device)

    def _laid_out(self, values: Tensor) -> Tensor:
        """Return values in the order of the layout, [out, in] row by row."""
        return values if self._order is None else values[self._order.to(values.device)]


def delta_layers(model: nn.Module) -> Iterator[tuple[str, DeltaLayer]]:
    """Yield what acts on layers of `model`, with the layers' names."""
    for path, module in model.named_modules():
        acting = module.__dict__.get(_DELTA)
        if acting is not None:
            yield path, acting


def selected_layers(model: nn.Module, selected: Mapping[str, Tensor]) -> dict[str, nn.Module]:
    """Return the linear layers of selected weights, by canonical name of the weight.

    Raises:
        ValueError: A weight is not that of one linear layer, or its layer has adapters other than plain LoRA.
    """
    modules = dict(model.named_modules())
    users = Counter(id(weight) for module in modules.values() for weight in module._parameters.values())
    found: dict[str, nn.Module] = {}
    for path, module in modules.items():
        name = canonical_name(f"{path}.weight" if path else "weight")
        weight = module._parameters.get("weight")
        if name in selected and isinstance(module, nn.Linear | Conv1D) and users[id(weight)] == 1:
            found[name] = module
            if path.endswith(".base_layer"):
                _check_adapters(name, modules[path.removesuffix(".base_layer")])
    missing = [name for name in selected if name not in found]
    if missing:
        raise ValueError(
            f"`mask` expected to select weights of linear layers where the base is frozen or quantised but"
            f" `{missing[0]}` is that of none, or of several ({len(missing)} such tensors). Unfreeze the base, or score"
            " with `exclude=` these."
        )
    return found


def _check_adapters(name: str, adapted: Any) -> None:
    """Refuse adapters that do more to a layer than to add something to its output."""
    plain = hasattr(adapted, "lora_variant") and not adapted.lora_variant
    if not plain:
        found = f"others ({adapter_kind(adapted)}), or a variant such as DoRA: they use the weight in ways of their own"
    elif adapted.merged:
        found = f"merged ones ({adapted.merged_adapters}): its weight is another already. Call `unmerge_adapter()`"
    else:
        return
    raise ValueError(f"`{name}` expected to have no adapters, or plain LoRA ones, but has {found}.")


class _GradientOfEntries(torch.autograd.Function):
    """The identity of a layer's output, which hands the gradient of its weight to a parameter of selected entries."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, inputs: Tensor, values: Tensor, entries: MatrixEntries) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.entries, ctx.dtype = entries, values.dtype
        # Of an output that is handed on as it is, the model could change nothing in place.
        return output.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, Tensor | None, None]:
        if not ctx.needs_input_grad[2]:
            return gradient, None, None, None
        (inputs,), entries = ctx.saved_tensors, ctx.entries
        with torch.autocast(gradient.device.type, enabled=False):
            upstream = gradient.reshape(-1, gradient.shape[-1]).t().index_select(0, entries.rows)
            taken = inputs.reshape(-1, inputs.shape[-1]).index_select(1, entries.columns)
            return gradient, None, entries.sampled(upstream.to(ctx.dtype), taken.to(ctx.dtype)), None


def _shape(layer: nn.Module) -> tuple[int, int]:
    """Return (out, in)."""
    if isinstance(layer, Conv1D):
        return layer.weight.shape[1], layer.weight.shape[0]
    assert isinstance(layer, nn.Linear)
    return layer.out_features, layer.in_features
