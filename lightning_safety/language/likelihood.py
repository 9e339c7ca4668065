# SPDX-License-Identifier: Apache-2.0
"""The log-probability a model gives to the labelled tokens of a batch."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_safety.data.collator import IGNORED_LABEL
from lightning_safety.language.prefix import compute_shared_prefix


def response_log_probabilities(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return, per example, the sum of the log-probabilities of its labelled tokens, and how many there are.

    The vocabulary projection runs on the labelled positions only: prompts and padding, often most of a batch, cost no
    row of [vocabulary] logits.

    Args:
        model: A causal language model. Its mode is left as it is.
        batch: ``input_ids``, ``attention_mask`` and ``labels`` of shape [batch, length], as `pad_batch` gives them, on
            the model's device. Labels are -100 where nothing is counted, and not shifted: that is done here. The label
            of the first token is never counted, as nothing predicts it.

    Returns:
        Sums in nats and counts, both of shape [batch] and float32 (float64 for a float64 model). The sums are
        differentiable. An example without labels gets 0 and 0.

    Raises:
        ValueError: `batch` lacks one of the three.
    """
    logits, targets, counted = response_logits(model, batch)
    precise = logits if logits.dtype == torch.float64 else logits.float()
    values = -functional.cross_entropy(precise, targets, reduction="none")
    sums = values.new_zeros(counted.shape).masked_scatter(counted, values).sum(dim=1)
    return sums, counted.sum(dim=1, dtype=sums.dtype)


def response_logits(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return what a model predicts where a batch has labels, row after row; arguments and errors as above.

    Tokens that all rows begin with are computed once (`compute_shared_prefix`).

    Returns:
        Logits [N, vocabulary] in the model's dtype, the N labels, and the mask [batch, length - 1] of where they stand.
    """
    missing = [name for name in ("input_ids", "attention_mask", "labels") if name not in batch]
    if missing:
        raise ValueError(f"`batch` expected to hold {', '.join(missing)} but holds {', '.join(batch)}.")
    labels = batch["labels"][:, 1:]
    # With padding on the left the first token follows padding, which predicts nothing.
    counted = (labels != IGNORED_LABEL) & (batch["attention_mask"][:, :-1] != 0)
    # No row of logits from the last position: nothing follows it.
    logits = _logits_at(model, batch["input_ids"], batch["attention_mask"], functional.pad(counted, (0, 1)))
    return logits, labels[counted], counted


def _logits_at(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, positions: Tensor) -> Tensor:
    """Return the logits [N, vocabulary] at the N positions where the mask [batch, length] is true."""
    first = int(positions.any(dim=0).int().argmax())
    prefix = compute_shared_prefix(model, input_ids, attention_mask, limit=first)
    arguments = forward_arguments(model, attention_mask) | {"input_ids": input_ids[:, prefix.length :]}
    if prefix.cache is not None:
        arguments |= {"past_key_values": prefix.cache, "use_cache": True}
        positions = positions[:, prefix.length :]
    return logits_at(model, arguments, positions.nonzero(as_tuple=True))


def logits_at(model: nn.Module, arguments: Mapping[str, Any], places: tuple[Tensor, ...]) -> Tensor:
    """Return the logits at some places of a forward pass; the vocabulary projection runs on these only.

    Args:
        model: A causal language model.
        arguments: Of its forward pass; ``input_ids`` [batch, length] among them.
        places: Row and position of each place, int64 [N] both. A place may occur several times.

    Returns:
        [N, vocabulary], in the model's dtype.
    """
    shape = arguments["input_ids"].shape
    head = output_head(model)
    handle = None
    selected = False
    if head is not None:
        # Inside of the model's own forward, so that what it does after the head (soft caps, scaling) is kept.
        def select(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
            nonlocal selected
            hidden = inputs[0] if inputs else None
            if not isinstance(hidden, Tensor) or hidden.shape[:2] != shape:
                return None
            selected = True
            return (hidden[places].unsqueeze(0), *inputs[1:])

        handle = head.register_forward_pre_hook(select)
    try:
        output = model(**arguments)
    finally:
        if handle is not None:
            handle.remove()
    logits: Tensor = output.logits
    return logits.squeeze(0) if selected else logits[places]


def output_head(model: nn.Module) -> nn.Module | None:
    """Return what turns hidden states into logits, or None where the model does not say."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    return head if isinstance(head, nn.Module) else None


def forward_arguments(model: nn.Module, attention_mask: Tensor) -> dict[str, Any]:
    """Return what a forward pass of a padded batch takes beside its tokens, as far as the model knows of it.

    Args:
        model: A causal language model.
        attention_mask: 1 where a token is, and 0 on padding, on either side. [batch, length].
    """
    arguments: dict[str, Any] = {"attention_mask": attention_mask}
    accepted = inspect.signature(model.forward).parameters
    if "use_cache" in accepted:
        arguments["use_cache"] = False
    if "position_ids" in accepted and not bool(attention_mask[:, 0].all()):
        # With padding on the left the model would count positions from the padding.
        arguments["position_ids"] = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
    return arguments
