# SPDX-License-Identifier: Apache-2.0
"""Weights that bitsandbytes has quantised: telling them apart, their shape and values, and keeping them readable.

bitsandbytes is imported by whoever quantises a model; until then there are no such weights. Nothing here imports it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

_PACKED_NAMES = {"qweight", "W_q"}
"""What layers of GPTQ, AWQ, AQLM, HQQ and others call their packed weight."""
_LOAD_OTHERWISE = (
    'Load the unquantised model, or quantise that one with `load_causal_lm(…, quantization="nf4")` or `"int8"`.'
)


def is_quantized_weight(parameter: Tensor) -> bool:
    """Whether a parameter holds numbers that bitsandbytes packed: NF4, FP4 or int8.

    Its dtype does not tell: 4-bit weights may be stored as bfloat16.

    Example:
        >>> import torch
        >>> is_quantized_weight(nn.Parameter(torch.ones(2)))
        False
    """
    library = _bitsandbytes()
    if library is None:
        return False
    return isinstance(parameter, library.Params4bit | library.Int8Params)


def weight_shape(parameter: Tensor) -> tuple[int, ...]:
    """Return the shape that a weight has in its layer, [out, in] for a linear one, however it is stored.

    Raises:
        ValueError: It is 4-bit and without its scales.

    Example:
        >>> import torch
        >>> weight_shape(nn.Parameter(torch.ones(2, 3)))
        (2, 3)
    """
    if not is_quantized_weight(parameter) or not _is_four_bit(parameter):
        return tuple(parameter.shape)
    state = getattr(parameter, "quant_state", None)
    if state is None:
        raise ValueError(
            "`model` expected to hold 4-bit weights with their scales but one has none. Move the model to its device"
            " once (that is when bitsandbytes quantises), or load it again."
        )
    return tuple(state.shape)


def count_weights(weights: Iterable[Tensor]) -> int:
    """Return how many entries weights have in their layers, however they are stored.

    Raises:
        ValueError: One is 4-bit and without its scales.

    Example:
        >>> import torch
        >>> count_weights([nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(4))])
        10
    """
    return sum(math.prod(weight_shape(weight)) for weight in weights)


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Yield name and module of each linear layer whose weight bitsandbytes quantised."""
    library = _bitsandbytes()
    if library is not None:
        for name, module in model.named_modules():
            if isinstance(module, library.Linear4bit | library.Linear8bitLt):
                yield name, module


def dequantized_weight(layer: nn.Module) -> Tensor:
    """Return a dense copy of the weight that a quantised linear layer multiplies with.

    Args:
        layer: One of `quantized_layers`.

    Returns:
        [out, in], in the dtype that bitsandbytes dequantises to: for 4 bits that of the model before it was quantised,
        for 8 bits float32.

    Raises:
        ValueError: The weight was repacked for the CPU and cannot be read any more. See `keep_unpacked`.
    """
    from bitsandbytes import functional

    weight: Any = layer.weight
    if _is_four_bit(weight):
        _check_unpacked("the layer", weight)
        four_bit: Tensor = functional.dequantize_4bit(weight.data, weight.quant_state)
        return four_bit
    # The first forward pass moves the scales from the weight to the layer.
    state: Any = layer.state
    scales = state.SCB if weight.SCB is None else weight.SCB
    eight_bit: Tensor = functional.int8_vectorwise_dequant(weight.data, scales)
    return eight_bit


@contextmanager
def exact_inputs(model: nn.Module) -> Iterator[None]:
    """Let 8-bit layers multiply their inputs, as they are, with dequantised weights.

    In evaluation mode, and on GPUs in training too, bitsandbytes quantises inputs as well, all but the columns with an
    outlier in some row: the result of one row depends on the others in its batch.

    Args:
        model: Any module. Afterwards its layers are as they were.
    """
    with ExitStack() as context:
        for _, layer in quantized_layers(model):
            if not _is_four_bit(layer.weight):
                # accelerate, where it spreads a model over devices, calls the layer's own function by this name.
                name = "_old_forward" if "_old_forward" in vars(layer) else "forward"
                if name in vars(layer):
                    context.callback(setattr, layer, name, vars(layer)[name])
                else:
                    context.callback(delattr, layer, name)
                setattr(layer, name, partial(_multiply, layer))
        yield


def _multiply(layer: nn.Linear, inputs: Tensor) -> Tensor:
    multiply: Callable[..., Tensor] = _DequantizedProduct.apply
    output = multiply(inputs, layer)
    return output if layer.bias is None else output + layer.bias.to(output.dtype)


class _DequantizedProduct(torch.autograd.Function):
    """The product with a dequantised weight, which is made anew for the backward pass."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, layer: nn.Linear) -> Tensor:
        ctx.layer = layer
        return nn.functional.linear(inputs, dequantized_weight(layer).to(inputs.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ dequantized_weight(ctx.layer).to(gradient.dtype), None


def keep_unpacked(model: nn.Module) -> None:
    """Keep 4-bit weights as they are through forward passes without gradient; call it before the first one.

    On CPUs with AVX512-BF16, such a pass in evaluation mode (Lightning's sanity check is one) makes bitsandbytes repack
    the weight for a faster kernel, for good and with rounded scales. Afterwards adapters below the layer get no
    gradient, dequantising returns something else, and a saved model differs from the loaded one.

    Args:
        model: Any module. Layers that are not 4-bit stay as they are. The choice lasts until the layer is made anew.

    Raises:
        ValueError: A weight was repacked already, which cannot be undone exactly.
    """
    for name, layer in quantized_layers(model):
        if _is_four_bit(layer.weight):
            _check_unpacked(f"`{name}`", layer.weight)
            layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def check_quantization_supported(model: nn.Module) -> None:
    """Refuse a model quantised in a way whose weights cannot be read: only those of bitsandbytes can (NF4, FP4, int8).

    Args:
        model: Any module.

    Raises:
        ValueError: It is quantised otherwise; the message names the method and what to do.
    """
    for name, module in model.named_modules():
        problem = _unsupported(module)
        if problem is not None:
            raise ValueError(
                "`model` expected to be unquantised or quantised by bitsandbytes (NF4, FP4, int8) but"
                f" {f'`{name}`' if name else 'it'} {problem}"
            )


def _unsupported(module: nn.Module) -> str | None:
    """Return what is wrong with a quantised module and what to do, None where nothing is."""
    kind, method = type(module).__name__, getattr(module, "quantization_method", None)
    if getattr(module, "is_quantized", False) and method != "bitsandbytes":
        return f"is quantised by {getattr(method, 'value', method) or 'an unknown method'}. {_LOAD_OTHERWISE}"
    if kind == "Bnb4bitParametrization" or _PACKED_NAMES & (module._parameters.keys() | module._buffers.keys()):
        return f"is a {kind}, which packs its weight in a way of its own. {_LOAD_OTHERWISE}"
    library = _bitsandbytes()
    if library is None or not isinstance(module, library.Linear4bit | library.Linear8bitLt):
        return None
    weight: Any = module.weight
    if not is_quantized_weight(weight):
        return f"is a {kind} whose weight is a {type(weight).__name__}. Load the model again."
    if getattr(weight, "has_fp16_weights", False):
        return f"quantises 16-bit weights at every step (`llm_int8_has_fp16_weight=True`). {_LOAD_OTHERWISE}"
    if weight.quant_state is None if _is_four_bit(weight) else weight.is_floating_point():
        return "is not quantised yet. Move the model to its device: that is when bitsandbytes quantises."
    if getattr(getattr(module, "source_cls", None), "__name__", "") == "Conv1D":
        return (
            "was a Conv1D (as in GPT-2), whose weight is transposed when it is quantised, so that a mask would fit"
            " either the dense model or this one. Load the model unquantised."
        )
    return None


def _check_unpacked(place: str, weight: Any) -> None:
    if getattr(weight.quant_state, "packing_format_for_cpu", False):
        raise ValueError(
            f"`model` expected to hold its 4-bit weights as they were loaded but that of {place} was repacked for this"
            " CPU by a forward pass without gradient, which rounds its scales and cannot be undone. Load the model"
            " again with `load_causal_lm`, or call `keep_unpacked(model)` before its first forward pass."
        )


def _is_four_bit(weight: object) -> bool:
    library = _bitsandbytes()
    return library is not None and isinstance(weight, library.Params4bit)


def _bitsandbytes() -> Any:
    """Return the layers of bitsandbytes where something has imported it, else None."""
    return sys.modules.get("bitsandbytes.nn")
