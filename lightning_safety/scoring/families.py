# SPDX-License-Identifier: Apache-2.0
"""Where the mixture-of-experts families of transformers keep experts and routers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

_GATE = ("*.mlp.experts", ("*.mlp.gate", "*.mlp.shared_expert_gate"))
_ROUTER = ("*.mlp.experts", ("*.mlp.router",))
_SPARSE_ROUTER = ("*.block_sparse_moe.experts", ("*.block_sparse_moe.router",))
_FEED_FORWARD_ROUTER = ("*.feed_forward.experts", ("*.feed_forward.router",))

FAMILIES: dict[str, tuple[str, tuple[str, ...]]] = {
    "afmoe": _ROUTER,
    "cohere2_moe": _GATE,
    "deepseek_v2": _GATE,
    "deepseek_v3": _GATE,
    "dots1": _GATE,
    "ernie4_5_moe": _GATE,
    "exaone_moe": _GATE,
    "flex_olmo": _GATE,
    "gemma4_text": ("*.layers.*.experts", ("*.layers.*.router",)),
    "glm4_moe": _GATE,
    "glm4_moe_lite": _GATE,
    "gpt_oss": _ROUTER,
    "granitemoe": _SPARSE_ROUTER,
    "granitemoehybrid": _SPARSE_ROUTER,
    "granitemoeshared": _SPARSE_ROUTER,
    "hunyuan_v1_moe": _GATE,
    "jamba": _FEED_FORWARD_ROUTER,
    "lfm2_moe": ("*.feed_forward.experts", ("*.feed_forward.gate",)),
    "llama4_text": _FEED_FORWARD_ROUTER,
    "minimax": _GATE,
    "minimax_m2": _GATE,
    "mixtral": _GATE,
    "nemotron_h": ("*.mixer.experts", ("*.mixer.gate",)),
    "olmoe": _GATE,
    "phimoe": _ROUTER,
    "qwen2_moe": _GATE,
    "qwen3_5_moe_text": _GATE,
    "qwen3_moe": _GATE,
    "qwen3_next": _GATE,
}
"""By ``config.model_type``: the pattern of the modules that hold experts, and those of routers and gates."""

WEIGHS_ALL = ("llama4_text",)
"""Families whose routers return a weight for every expert, 0 where it is not chosen, instead of the chosen numbers."""

_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "num_routed_experts", "moe_num_experts", "n_experts")


def text_config(model: nn.Module) -> Any:
    """Return the configuration of the language model inside of a model, or None where there is none."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "model_type"):
            nested = getattr(config, "get_text_config", None)
            return nested() if callable(nested) else config
    return None


def number_of_experts(config: Any) -> int:
    """Return the largest number of experts that a configuration, or a part of it, speaks of; 0 where it does not.

    Example:
        >>> from transformers import LlamaConfig, MixtralConfig
        >>> number_of_experts(MixtralConfig(num_local_experts=4)), number_of_experts(LlamaConfig())
        (4, 0)
    """
    values = config.to_dict() if callable(getattr(config, "to_dict", None)) else getattr(config, "__dict__", {})
    return max(_counts(values), default=0)


def _counts(values: Mapping[str, Any]) -> Iterable[int]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _counts(value)
        elif name in _COUNTS and isinstance(value, int):
            yield value
        elif name in _COUNTS and isinstance(value, list | tuple):
            yield from (number for number in value if isinstance(number, int))
