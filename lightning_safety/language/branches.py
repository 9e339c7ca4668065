# SPDX-License-Identifier: Apache-2.0
"""Rows that begin alike as branches of one row: the beginning is computed once, and no branch sees another.

After the beginning comes the rest of the first row, then that of the second at the positions where it stood, and so on.
Two answers to one prompt save half of their tokens so, and nothing is padded between branches.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_safety.data.collator import IGNORED_LABEL
from lightning_safety.language.likelihood import logits_at, response_log_probabilities
from lightning_safety.language.prefix import TokensRun, can_share_prefix, compute_shared_prefix, tokens_run

_BEGINNING = 0
_PADDING = -1


class _Branched(NamedTuple):
    """Groups of rows, each merged to one. Lists of lists are by merged row."""

    tokens: list[list[int]]
    positions: list[list[int]]
    branches: list[list[int]]
    starts: list[int]  # of the branches
    rows: list[int]  # of each label: the merged row, the place that predicts it, the label, and the row it came from
    places: list[int]
    labels: list[int]
    owners: list[int]


def paired_log_probabilities(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return what `response_log_probabilities` does, for rows of which two each begin with the same prompt.

    Where a model cannot attend by a mask of our own (it is no decoder of full attention under scaled dot-product
    attention), rows are run one by one.

    Args:
        model: As there.
        batch: As there, of 2n rows, padded on the right: row i and row n + i are a pair.

    Returns:
        As there.
    """
    return _log_probabilities(model, batch, _pairs(batch))


def packed_log_probabilities(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return what `response_log_probabilities` does, with all rows in one, or as they are where a model cannot.

    For a few short rows: every weight is used once, and attention looks at all of them for each.

    Args:
        model: As there.
        batch: As there, padded on the right.

    Returns:
        As there.
    """
    return _log_probabilities(model, batch, [range(len(batch["input_ids"]))])


def _log_probabilities(
    model: nn.Module, batch: Mapping[str, Tensor], groups: Sequence[Sequence[int]]
) -> tuple[Tensor, Tensor]:
    merged = _merge(batch, groups) if _can_branch(model) else None
    if merged is None:
        return response_log_probabilities(model, batch)
    device = batch["input_ids"].device
    tokens, present = _padded_tokens(merged, device)
    positions, branches = _padded(merged.positions, 0, device), _padded(merged.branches, _PADDING, device)
    # The token before a branch predicts its first, so it is run with the rest.
    prefix = compute_shared_prefix(model, tokens, present, limit=min(merged.starts) - 1)
    length = tokens.shape[1]
    queries, keys = branches[:, prefix.length :, None], branches[:, None, :]
    earlier = torch.ones(length, length, dtype=torch.bool, device=device).tril()[prefix.length :]
    seen = earlier & ((keys == _BEGINNING) | (keys == queries))
    arguments: dict[str, Any] = {
        "input_ids": tokens[:, prefix.length :],
        "attention_mask": seen[:, None],
        "position_ids": positions[:, prefix.length :],
        "use_cache": prefix.cache is not None,
    }
    if prefix.cache is not None:
        arguments["past_key_values"] = prefix.cache
    rows, places, labels, owners = (
        torch.tensor(values, device=device) for values in (merged.rows, merged.places, merged.labels, merged.owners)
    )
    logits = logits_at(model, arguments, (rows, places - prefix.length))
    precise = logits if logits.dtype == torch.float64 else logits.float()
    values = -functional.cross_entropy(precise, labels, reduction="none")
    empty = values.new_zeros(len(batch["input_ids"]))
    return empty.index_add(0, owners, values), empty.index_add(0, owners, torch.ones_like(values))


def paired_tokens_run(model: nn.Module, batch: Mapping[str, Tensor]) -> TokensRun:
    """Return what `paired_log_probabilities` runs of a batch; arguments as there."""
    return _tokens_run(model, batch, _pairs(batch))


def packed_tokens_run(model: nn.Module, batch: Mapping[str, Tensor]) -> TokensRun:
    """Return what `packed_log_probabilities` runs of a batch; arguments as there."""
    return _tokens_run(model, batch, [range(len(batch["input_ids"]))])


def _tokens_run(model: nn.Module, batch: Mapping[str, Tensor], groups: Sequence[Sequence[int]]) -> TokensRun:
    merged = _merge(batch, groups) if _can_branch(model) else None
    if merged is None:
        return tokens_run(model, batch["input_ids"], batch["attention_mask"])
    return tokens_run(model, *_padded_tokens(merged, batch["input_ids"].device))


def _pairs(batch: Mapping[str, Tensor]) -> list[tuple[int, int]]:
    half = len(batch["input_ids"]) // 2
    return [(number, half + number) for number in range(half)]


def _merge(batch: Mapping[str, Tensor], groups: Sequence[Sequence[int]]) -> _Branched | None:
    """Merge the rows of each group; None where some begin with nothing in common, have no label or belong to none."""
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    rows = [row[:length] for row, length in zip(batch["input_ids"].tolist(), lengths, strict=True)]
    labels = [row[:length] for row, length in zip(batch["labels"].tolist(), lengths, strict=True)]
    if sum(map(len, groups)) != len(rows) or not bool(batch["attention_mask"][:, 0].all()):
        return None
    merged = _Branched([], [], [], [], [], [], [], [])
    for number, group in enumerate(groups):
        learned = [[place for place, label in enumerate(labels[row]) if label != IGNORED_LABEL] for row in group]
        if not all(learned):
            return None
        start = min(_common_length([rows[row] for row in group]), *(places[0] for places in learned))
        # At least one token before the branches predicts what they begin with.
        if start < 1:
            return None
        tokens, positions, branches = rows[group[0]][:start], list(range(start)), [_BEGINNING] * start
        for branch, (row, places) in enumerate(zip(group, learned, strict=True), start=1):
            moved = len(tokens) - start
            tokens += rows[row][start:]
            positions += range(start, len(rows[row]))
            branches += [branch] * (len(rows[row]) - start)
            for place in places:
                merged.rows.append(number)
                merged.places.append(place - 1 + (moved if place > start else 0))
                merged.labels.append(labels[row][place])
                merged.owners.append(row)
        merged.starts.append(start)
        merged.tokens.append(tokens)
        merged.positions.append(positions)
        merged.branches.append(branches)
    return merged


def _common_length(rows: Sequence[Sequence[int]]) -> int:
    """Return with how many same tokens all rows begin."""
    length = 0
    for together in zip(*rows, strict=False):
        if len(set(together)) > 1:
            break
        length += 1
    return length


def _padded_tokens(merged: _Branched, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the tokens of merged rows, and 1 where there are some."""
    present = [[1] * len(row) for row in merged.tokens]
    return _padded(merged.tokens, 0, device), _padded(present, 0, device)


def _padded(values: list[list[int]], filler: int, device: torch.device) -> Tensor:
    length = max(map(len, values))
    return torch.tensor([row + [filler] * (length - len(row)) for row in values], device=device)


def _can_branch(model: nn.Module) -> bool:
    """Whether masks and positions of our own are all that tells a model what precedes what."""
    config: Any = getattr(model, "config", None)
    # Code from elsewhere may take a mask of four dimensions for something else.
    if not type(model).__module__.startswith("transformers."):
        return False
    if not can_share_prefix(model) or "position_ids" not in inspect.signature(model.forward).parameters:
        return False
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    text = config.get_text_config()
    # Biases by distance know an order of their own, and the loss of routers looks at the mask.
    if getattr(text, "alibi", False) or getattr(text, "output_router_logits", False):
        return False
    if not all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers):
        return False
    return bool(getattr(text, "_attn_implementation", None) == "sdpa")
