# SPDX-License-Identifier: Apache-2.0
"""Quantising the linear layers of a model with bitsandbytes while it is loaded."""

from __future__ import annotations

import importlib.util
import logging
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from lightning_safety.language.quantized import keep_unpacked, quantized_layers

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

Quantization = Literal["nf4", "int8"]


def check_quantization(quantization: str | None, dtype: str | torch.dtype) -> None:
    """Check the arguments of `load_causal_lm` before anything is read.

    Args:
        quantization: The argument.
        dtype: A torch dtype, or ``"auto"``.

    Raises:
        ImportError: bitsandbytes is missing.
        ValueError: There is no such quantisation, or not from this dtype.
    """
    if quantization is None:
        return
    if quantization not in get_args(Quantization):
        raise ValueError(
            f"`quantization` expected to be one of {', '.join(map(repr, get_args(Quantization)))} or None but got"
            f" {quantization!r}. Pass 'nf4' for 4 bits a weight, 'int8' for 8."
        )
    if dtype == torch.float64:
        raise ValueError(
            f"`dtype` expected to be of 16 or 32 bits beside `quantization={quantization!r}` but got float64, which"
            " bitsandbytes does not take. Pass `dtype=torch.bfloat16` or `torch.float32`."
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError(
            f"`quantization={quantization!r}` needs the package bitsandbytes. Run `pip install bitsandbytes`, or leave"
            " `quantization` out."
        )


def check_dense(config: PretrainedConfig, quantization: Quantization, dtype: str | torch.dtype) -> None:
    """Check that a model is stored in a form that can be quantised.

    Args:
        config: Of the stored model.
        quantization: What to quantise to.
        dtype: As for `check_quantization`; ``"auto"`` is that of the stored model.

    Raises:
        ValueError: It is quantised already, or stored in float64.
    """
    stored: Any = getattr(config, "quantization_config", None)
    if stored is not None:
        method = stored.get("quant_method") if isinstance(stored, dict) else getattr(stored, "quant_method", None)
        raise ValueError(
            f"`quantization` expected to be None for a model that is stored quantised (by {method}) but got"
            f" {quantization!r}. Leave it out to load the model as it is stored."
        )
    check_quantization(quantization, dtype if dtype != "auto" else getattr(config, "dtype", None) or "auto")


def quantization_arguments(quantization: Quantization) -> dict[str, Any]:
    """Return the arguments of ``from_pretrained`` that quantise a model on the CPU."""
    from transformers import BitsAndBytesConfig

    if quantization == "nf4":
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    else:
        config = BitsAndBytesConfig(load_in_8bit=True)
    return {"quantization_config": config, "device_map": {"": "cpu"}}


def quantize(model: PreTrainedModel, quantization: Quantization) -> PreTrainedModel:
    """Return a loaded dense model quantised: the same as if it had been saved, and loaded quantised."""
    quantized: PreTrainedModel = type(model).from_pretrained(
        None,
        config=model.config,
        state_dict=model.state_dict(),
        dtype=model.dtype,
        **quantization_arguments(quantization),
    )
    quantized.generation_config = model.generation_config
    return quantized


def settle(model: PreTrainedModel, quantization: Quantization | None) -> None:
    """Finish what loading leaves open: in which dtype 4-bit layers compute, and that their weights stay as they are.

    Args:
        model: A loaded model.
        quantization: What it was quantised to just now. None: it is dense, or as it was stored.

    Raises:
        ValueError: A weight was repacked. See `keep_unpacked`.
    """
    if quantization == "nf4":
        # Only now is it known where `dtype` says "as stored".
        model.config.quantization_config.bnb_4bit_compute_dtype = model.dtype
        for _, layer in quantized_layers(model):
            layer.compute_dtype = model.dtype
    keep_unpacked(model)
    if any(quantized_layers(model)):
        _warn_of_casts_once()


def _warn_of_casts_once() -> None:
    """Let bitsandbytes say once, not at every call of every 8-bit layer, that it casts inputs to float16."""
    logger = logging.getLogger("bitsandbytes.autograd._functions")
    if not any(isinstance(present, _Once) for present in logger.filters):
        logger.addFilter(_Once())


class _Once(logging.Filter):
    """Lets each message through once."""

    def __init__(self) -> None:
        super().__init__()
        self._said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        said = record.getMessage() in self._said
        self._said.add(record.getMessage())
        return not said
