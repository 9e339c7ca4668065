# SPDX-License-Identifier: Apache-2.0
"""Greedy replies to many prompts at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from lightning_safety.arguments import check_positive
from lightning_safety.data.collator import TokenizedExample, length_buckets, pad_batch
from lightning_safety.language.chat import encode_prompt, end_of_turn_id
from lightning_safety.language.modes import evaluation_mode
from lightning_safety.language.prefix import compute_shared_prefix
from lightning_safety.language.tokenizer import pad_token_id
from lightning_safety.progress import track
from lightning_safety.randomness import preserved_random_state

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase


def generate_replies(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 24,
    batch_size: int = 16,
    show_progress: bool = True,
    together: bool = False,
) -> list[str]:
    """Generate the model's most likely reply to each prompt.

    Prompts of similar length share a batch, and what they have in common is computed once. Decoding is greedy whatever
    the model's generation
    config says (no temperature, no repetition penalty), and stops at the end of the turn. The model comes back as it
    was: mode of every submodule, generation config, cache setting; and so does the random state.

    Args:
        model: A causal language model with ``generate``.
        tokenizer: With a chat template.
        prompts: At least one.
        max_new_tokens: The longest reply.
        batch_size: Prompts at a time.
        show_progress: Whether to show a bar when it takes over two seconds.
        together: Whether the processes of the group share one model (FSDP2). Then every process must call this with the
            same prompts, and none stops generating before all have their replies.

    Returns:
        The replies in the order of the prompts, without special tokens and surrounding white space; possibly empty.

    Raises:
        TypeError: `prompts` is a single string, or `model` has no ``generate``.
        ValueError: No prompts, no chat template, or a prompt that leaves no room for a reply in the model's context.
    """
    if isinstance(prompts, str):
        raise TypeError("`prompts` expected to be a sequence of prompts but got a single string. Put it in a list.")
    if not prompts:
        raise ValueError("`prompts` expected to hold at least one prompt but it is empty.")
    check_positive(max_new_tokens, "max_new_tokens")
    generate = getattr(model, "generate", None)
    if not callable(generate):
        raise TypeError(
            f"`model` expected to be a causal language model that generates but got {type(model).__name__}."
        )
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    _check_context(model, encoded, prompts, max_new_tokens)
    stops = _stop_ids(model, tokenizer)
    settings = _greedy(max_new_tokens, pad_token_id(tokenizer), stops)
    device = next(model.parameters()).device
    replies = [""] * len(prompts)
    batches = length_buckets([len(token_ids) for token_ids in encoded], batch_size)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(evaluation_mode(model))
        stack.enter_context(preserved_random_state())
        stack.enter_context(_generation_config(model, settings))
        stack.enter_context(_cast_once(model))
        for indices in track(batches, "Generating replies", enabled=show_progress):
            inputs = _inputs(model, [encoded[index] for index in indices], pad_token_id(tokenizer), device)
            generated = generate(**inputs, synced_gpus=together)[:, inputs["input_ids"].shape[1] :].tolist()
            for index, token_ids in zip(indices, generated, strict=True):
                replies[index] = _decode(tokenizer, token_ids, stops)
    return replies


def _inputs(model: nn.Module, rows: Sequence[list[int]], pad_id: int, device: torch.device) -> dict[str, Any]:
    """Return what ``generate`` takes: what the rows have in common computed already, the rest padded on the left."""
    whole = _pad(rows, pad_id, "right", device)
    prefix = compute_shared_prefix(model, whole["input_ids"], whole["attention_mask"])
    rest = _pad([row[prefix.length :] for row in rows], pad_id, "left", device)
    if prefix.cache is None:
        return rest
    # The padding stands between the prefix and the rest, where attention and positions pass over it.
    joined = {name: torch.cat([whole[name][:, : prefix.length], rest[name]], dim=1) for name in rest}
    return {**joined, "past_key_values": prefix.cache}


def _pad(
    rows: Sequence[list[int]], pad_id: int, side: Literal["left", "right"], device: torch.device
) -> dict[str, Tensor]:
    batch = pad_batch([TokenizedExample(row, row) for row in rows], pad_token_id=pad_id, padding_side=side)
    return {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}


def _decode(tokenizer: PreTrainedTokenizerBase, token_ids: list[int], stops: set[int]) -> str:
    end = next((place for place, token_id in enumerate(token_ids) if token_id in stops), len(token_ids))
    text = tokenizer.decode(token_ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return str(text).strip()


def _stop_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return every token that ends a reply: the template's, the tokenizer's and the model's own."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    candidates = [end_of_turn_id(tokenizer), tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    return {int(token_id) for token_id in candidates if token_id is not None}


def _greedy(max_new_tokens: int, pad_id: int, stops: set[int]) -> GenerationConfig:
    from transformers import GenerationConfig

    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        use_cache=True,
        pad_token_id=pad_id,
        eos_token_id=sorted(stops),
    )


@contextmanager
def _generation_config(model: Any, settings: GenerationConfig) -> Iterator[None]:
    """Replace the model's own config: what is only passed to ``generate`` is filled up from it."""
    before = model.generation_config
    model.generation_config = settings
    try:
        yield
    finally:
        model.generation_config = before


@contextmanager
def _cast_once(model: nn.Module) -> Iterator[None]:
    """Let autocast keep what it casts of frozen weights, as it does of others: else every token casts them anew."""
    # Of other classes (shards, packed weights) what requires a gradient is more than a flag.
    cast = [
        weight
        for weight in model.parameters()
        if type(weight) is nn.Parameter
        and not weight.requires_grad
        and weight.dtype == torch.float32
        and torch.is_autocast_enabled(weight.device.type)
    ]
    try:
        for weight in cast:
            weight.requires_grad_(True)
        yield
    finally:
        for weight in cast:
            weight.requires_grad_(False)


def _check_context(model: Any, encoded: list[list[int]], prompts: Sequence[str], max_new_tokens: int) -> None:
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    longest = max(range(len(encoded)), key=lambda index: len(encoded[index]))
    needed = len(encoded[longest]) + max_new_tokens
    if limit is not None and needed > limit:
        raise ValueError(
            f"`prompts` expected to fit the model's context of {limit} tokens but with "
            f"`max_new_tokens={max_new_tokens}` this one takes {needed}: "
            f"{prompts[longest][:60]!r}…. Shorten it or lower `max_new_tokens`."
        )
