# SPDX-License-Identifier: Apache-2.0
"""Computing once what all rows of a batch begin with: the chat template's opening and the system prompt.

In a causal model the states of a prefix do not depend on what follows, so that one row's keys and values serve all
rows, gradients included. With short instructions the prefix is half of a batch.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import Cache

# Below this a second forward pass costs more than it saves.
_SHORTEST = 8
_ATTENDS_TO_ALL = {"full_attention", "attention"}
_OLD_NAME = "is_gradient_checkpointing"


class SharedPrefix(NamedTuple):
    """What the rows of a batch begin with.

    Attributes:
        length: Tokens that are the same in every row; 0: nothing is shared.
        cache: The keys and values of these tokens for every row, or None.
    """

    length: int
    cache: Cache | None


def compute_shared_prefix(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, *, limit: int | None = None
) -> SharedPrefix:
    """Run `model` once on the tokens that all rows begin with.

    Nothing is shared where that would change the result or cannot be done: one row, padding on the left, a short
    prefix, dropout in training (every row draws its own), gradient checkpointing, a model sharded by FSDP2, or one
    whose cache is more than keys and values (state-space layers, sliding windows).

    Args:
        model: A causal language model. Differentiable unless the caller switched gradients off.
        input_ids: int64 [batch, length].
        attention_mask: [batch, length].
        limit: Share at most so many tokens. Default: all but the last.

    Returns:
        The prefix. The remaining tokens are then run with ``past_key_values=cache``, ``use_cache=True`` and the whole
        attention mask.
    """
    length = common_prefix_length(input_ids, attention_mask)
    length = length if limit is None else min(length, limit)
    body = getattr(model, str(getattr(model, "base_model_prefix", "")), None)
    if length < _SHORTEST or not isinstance(body, nn.Module) or not can_share_prefix(model):
        return SharedPrefix(0, None)
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    cache = DynamicCache(config=model.config)
    # The body, not the model: no logits are needed here.
    body(input_ids=input_ids[:1, :length], past_key_values=cache, use_cache=True)
    if not all(type(layer) is DynamicLayer for layer in cache.layers):
        return SharedPrefix(0, None)
    cache.batch_repeat_interleave(len(input_ids))
    return SharedPrefix(length, cache)


class TokensRun(NamedTuple):
    """What a forward pass of a batch runs.

    Attributes:
        tokens: How many tokens, padding included.
        shared: Whether some are run by themselves before, so that every weight is used twice.
    """

    tokens: int
    shared: bool


def tokens_run(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> TokensRun:
    """Return what is run of a batch with what `compute_shared_prefix` would share; arguments as there."""
    length = common_prefix_length(input_ids, attention_mask)
    if length < _SHORTEST or not can_share_prefix(model):
        length = 0
    return TokensRun(input_ids.numel() - length * (len(input_ids) - 1), length > 0)


def common_prefix_length(input_ids: Tensor, attention_mask: Tensor) -> int:
    """Return how many leading tokens are attended to and the same in all rows, at least one less than any row has.

    Example:
        >>> import torch
        >>> common_prefix_length(torch.tensor([[5, 6, 7, 1], [5, 6, 8, 1]]), torch.ones(2, 4))
        2
    """
    if len(input_ids) < 2:
        return 0
    same = ((input_ids == input_ids[:1]) & (attention_mask != 0)).all(dim=0)
    shortest = int((attention_mask != 0).sum(dim=1).min())
    return min(int(same.long().cumprod(dim=0).sum()), shortest - 1)


def can_share_prefix(model: nn.Module) -> bool:
    """Return whether `compute_shared_prefix` can serve a model in its present mode, as far as that is known before."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_dict") or getattr(config, "is_encoder_decoder", False):
        return False
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        return False
    # FSDP2 gathers the weights of a model when that itself is called, not its body.
    if any(hasattr(module, "set_reshard_after_forward") for module in model.modules()):
        return False
    # State-space models, and layers that see only a window.
    if getattr(model, "_is_stateful", False) or getattr(config, "sliding_window", None) is not None:
        return False
    # Linear attention and convolutions, some of which refuse a cache of keys and values.
    if not set(getattr(config.get_text_config(), "layer_types", None) or ()) <= _ATTENDS_TO_ALL:
        return False
    if not model.training:
        return True
    dropout = any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules()) or any(
        isinstance(value, float) and value > 0 for name, value in config.to_dict().items() if "drop" in name
    )
    # Its older name warns that it is deprecated.
    checkpointing = "is_activation_checkpointing" if hasattr(model, "is_activation_checkpointing") else _OLD_NAME
    return not dropout and not getattr(model, checkpointing, False)
