# SPDX-License-Identifier: Apache-2.0
"""Language models: loading, finding, chat formatting, likelihood and generation. Needs no Lightning."""

from __future__ import annotations

from lightning_safety.language.chat import encode_example, encode_prompt, end_of_turn_id
from lightning_safety.language.find import canonical_name, find_language_model, named_weights
from lightning_safety.language.generation import generate_replies
from lightning_safety.language.likelihood import response_log_probabilities, response_logits
from lightning_safety.language.load import BUNDLED_MODEL, load_causal_lm, load_tokenizer
from lightning_safety.language.modes import evaluation_mode
from lightning_safety.language.quantized import (
    check_quantization_supported,
    count_weights,
    dequantized_weight,
    is_quantized_weight,
    keep_unpacked,
    quantized_layers,
    weight_shape,
)
from lightning_safety.language.save import save_language_model
from lightning_safety.language.tokenizer import find_tokenizer, pad_token_id

__all__ = [
    "BUNDLED_MODEL",
    "canonical_name",
    "check_quantization_supported",
    "count_weights",
    "dequantized_weight",
    "encode_example",
    "encode_prompt",
    "end_of_turn_id",
    "evaluation_mode",
    "find_language_model",
    "find_tokenizer",
    "generate_replies",
    "is_quantized_weight",
    "keep_unpacked",
    "load_causal_lm",
    "load_tokenizer",
    "named_weights",
    "pad_token_id",
    "quantized_layers",
    "response_log_probabilities",
    "response_logits",
    "save_language_model",
    "weight_shape",
]
