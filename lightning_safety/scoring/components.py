# SPDX-License-Identifier: Apache-2.0
"""What part of a transformer a weight belongs to, read from its name."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

COMPONENTS = ("q", "k", "v", "kv", "o", "qkv", "gate", "up", "gate+up", "down", "expert", "head")
"""The components in the order in which tables show them. Weights of other names form components of their own."""

_ATTENTION = {
    "q": ("q_proj", "q_lin", "query", "wq", "q", "q_a_proj", "q_b_proj"),
    "k": ("k_proj", "k_lin", "key", "wk", "k"),
    "v": ("v_proj", "v_lin", "value", "wv", "v"),
    "kv": ("kv_proj", "kv_a_proj_with_mqa", "kv_b_proj"),
    "o": ("o_proj", "out_proj", "out_lin", "dense", "c_proj", "wo", "o"),
    "qkv": ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "wqkv", "qkv", "W_pack"),
}
_FEED_FORWARD = {
    "gate": ("gate_proj", "w1"),
    "up": ("up_proj", "fc1", "fc_in", "c_fc", "dense_h_to_4h", "w3"),
    "gate+up": ("gate_up_proj",),
    "down": ("down_proj", "fc2", "fc_out", "c_proj", "dense_4h_to_h", "w2"),
}
_HEAD = ("lm_head", "embed_out")
_LAYER_LISTS = ("layers", "layer", "h", "blocks", "block")


def component_of(name: str, shape: Sequence[int] = ()) -> str:
    """Return the component of a weight: one of `COMPONENTS`, or for an unknown one the last part of its own name.

    Args:
        name: The parameter's dotted name.
        shape: Its shape; three dimensions mean fused experts.

    Example:
        >>> component_of("model.layers.3.self_attn.v_proj.weight"), component_of("transformer.h.0.mlp.c_proj.weight")
        ('v', 'down')
        >>> component_of("model.layers.0.mlp.experts.7.up_proj.weight"), component_of("layers.0.mixer.in_proj.weight")
        ('expert', 'in_proj')
    """
    parts = name.removesuffix(".weight").split(".")
    if len(shape) == 3 or "experts" in parts:
        return "expert"
    last = parts[-1]
    if last in _HEAD:
        return "head"
    # GPT-2 calls the output of both attention and MLP `c_proj`, and a gate inside of attention is no MLP's.
    groups = (_ATTENTION,) if _in_attention(parts) else (_FEED_FORWARD, _ATTENTION)
    for group in groups:
        for component, names in group.items():
            if last in names:
                return component
    return last


def layer_of(name: str) -> str:
    """Return the layer of a weight as its number, ``"head"`` for the output head, or ``"other"``.

    Example:
        >>> layer_of("model.layers.3.self_attn.v_proj.weight"), layer_of("lm_head.weight"), layer_of("project.weight")
        ('3', 'head', 'other')
    """
    parts = name.split(".")
    for parent, part in pairwise(parts):
        if parent in _LAYER_LISTS and part.isdecimal():
            return part
    return "head" if component_of(name) == "head" else "other"


def _in_attention(parts: Sequence[str]) -> bool:
    return any("attn" in part.lower() or "attention" in part.lower() for part in parts[:-1])
