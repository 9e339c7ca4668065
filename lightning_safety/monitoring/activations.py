# SPDX-License-Identifier: Apache-2.0
"""The residual stream at the last token of a prompt, where the model begins to answer."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from contextlib import nullcontext
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_safety.data.collator import TokenizedExample, length_buckets, pad_batch
from lightning_safety.language import encode_prompt, evaluation_mode, find_language_model, pad_token_id
from lightning_safety.language.likelihood import forward_arguments
from lightning_safety.language.prefix import compute_shared_prefix
from lightning_safety.processes import gather_shares, share_of
from lightning_safety.progress import track
from lightning_safety.randomness import preserved_random_state
from lightning_safety.scoring.shards import is_sharded, passes_of_all

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Activations = dict[int, Tensor]
"""By layer number: 0 is the embeddings, n what the n-th layer gives. float32 [prompts, hidden] on the CPU."""


def last_token_activations(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    layers: Sequence[float] = (0.65, 0.90),
    batch_size: int = 16,
    show_progress: bool = False,
    shared: bool = False,
) -> Activations:
    """Return the residual stream at the last token of each prompt: there the model begins to answer.

    The prompt stands in the chat template, the opening of the assistant's turn included. Batches are padded on the
    right whatever the tokenizer's side is, and what the prompts begin with alike is computed once.

    Args:
        model: A causal language model of transformers, wrapped (PEFT, torch.compile) or not. It is left as it was
            found, and so is the random state. No logits are computed.
        tokenizer: Its tokenizer, with a chat template.
        prompts: What the user says; at least one.
        layers: Two shares (low, high) of the n hidden states, embeddings included: numbers ⌊low·n⌋ … ⌊high·n⌋ − 1, as
            in arXiv 2505.14185; or a list of numbers in 0 … n − 1. The last one is normalised, as transformers has it.
        batch_size: Prompts at a time; it changes nothing but rounding.
        show_progress: Whether to show a bar when it takes over two seconds.
        shared: Whether the processes of the group share the prompts. Then every process must call this, and has them
            all. Of a model that is sharded over them (FSDP2), each runs all prompts.

    Returns:
        By layer number, float32 [prompts, hidden] on the CPU.

    Raises:
        TypeError: `prompts` is a single string, or `layers` are no numbers.
        ValueError: No prompts, no such layers, no chat template, a model that gives no hidden states, or activations
            that are not finite; the message names layer and prompt.
    """
    if isinstance(prompts, str):
        raise TypeError("`prompts` expected to be a sequence of prompts but got a single string. Put it in a list.")
    if not prompts:
        raise ValueError("`prompts` expected to hold at least one prompt but it is empty.")
    model = find_language_model(model)
    numbers = layer_numbers(layers, _count_hidden_states(model))
    rows = [TokenizedExample(token_ids, token_ids) for token_ids in (encode_prompt(tokenizer, p) for p in prompts)]
    device = next(model.parameters()).device
    sharded = shared and is_sharded(model.parameters())
    shared = shared and not sharded
    share = share_of(range(len(rows))) if shared else list(range(len(rows)))
    buckets = length_buckets([len(rows[index].input_ids) for index in share], batch_size)
    batches = [[share[place] for place in bucket] for bucket in buckets]
    by_prompt: dict[int, dict[int, Tensor]] = {}
    together = passes_of_all(model) if sharded else nullcontext()
    with together, torch.no_grad(), evaluation_mode(model), preserved_random_state():
        for indices in track(batches, "activations", enabled=show_progress):
            batch = pad_batch([rows[index] for index in indices], pad_token_id=pad_token_id(tokenizer))
            states = last_token_states(
                model, batch["input_ids"].to(device), batch["attention_mask"].to(device), numbers
            )
            _check_finite(states, indices)
            for place, index in enumerate(indices):
                # Copies: one that is sent would else carry its whole batch along.
                by_prompt[index] = {number: found[place].clone() for number, found in states.items()}
    found_in_order = [by_prompt[index] for index in share]
    found_in_order = gather_shares(found_in_order) if shared else found_in_order
    return {number: torch.stack([found[number] for found in found_in_order]) for number in numbers}


def last_token_states(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, layers: Sequence[int]
) -> Activations:
    """Return the residual stream at the last token of each row that is not padding.

    Args:
        model: A causal language model, in the mode in which it is to run. Differentiability is up to the caller.
        input_ids: int64 [batch, length], on the model's device.
        attention_mask: 1 where a token is and 0 on padding, on either side. [batch, length].
        layers: Numbers of hidden states.

    Returns:
        By layer number, float32 [batch, hidden] on the CPU.

    Raises:
        ValueError: The model gives no hidden states, or not as many as its config says.
    """
    body, more = _body(model)
    count = _count_hidden_states(model)
    prefix = compute_shared_prefix(model, input_ids, attention_mask)
    # A list: recent versions of transformers then keep these hidden states only; older ones read it as True.
    arguments = forward_arguments(body, attention_mask) | more | {"output_hidden_states": list(layers)}
    if prefix.cache is not None:
        arguments |= {"past_key_values": prefix.cache, "use_cache": True}
    output = body(input_ids=input_ids[:, prefix.length :], **arguments)
    states = getattr(output, "hidden_states", None)
    if states is None or len(states) != count:
        found = "none" if states is None else str(len(states))
        raise ValueError(
            f"`model` expected to give the {count} hidden states that its config speaks of but {type(model).__name__} "
            f"gave {found}."
        )
    # The count of real tokens is first at its highest at the last of them.
    last = attention_mask.cumsum(dim=1).argmax(dim=1) - prefix.length
    return {number: _take(states[number], last) for number in layers}


def layer_numbers(layers: Sequence[float], count: int) -> list[int]:
    """Return which of `count` hidden states are meant, in order; see `last_token_activations`.

    Raises:
        TypeError: `layers` are no numbers.
        ValueError: They are out of range or reversed, or none is left.

    Example:
        >>> layer_numbers((0.65, 0.90), 31), layer_numbers([3, 0], 31)
        ([20, 21, 22, 23, 24, 25, 26], [0, 3])
    """
    values = check_layers(layers)
    if any(isinstance(value, float) for value in values):
        # Exact: 0.29 · 100 is 28.999999999999996 in floating point.
        low, high = (math.floor(Fraction(str(value)) * count) for value in values)
        if low < high:
            return list(range(low, high))
        raise ValueError(f"`layers` expected to hold at least one of {count} hidden states but {values} holds none.")
    if max(values) >= count:
        raise ValueError(
            f"`layers` expected to be numbers in 0 … {count - 1} but got {max(values)}: the model has {count} hidden "
            "states, the embeddings included."
        )
    return sorted({int(value) for value in values})


def check_layers(layers: Sequence[float]) -> tuple[float, ...]:
    """Return `layers` as a tuple if they can be right for some model; errors as in `layer_numbers`."""
    values = tuple(layers) if isinstance(layers, Sequence) and not isinstance(layers, str) else ()
    if not values or any(isinstance(value, bool) or not isinstance(value, int | float) for value in values):
        raise TypeError(
            f"`layers` expected to be two shares of the depth or a list of layer numbers but got {layers!r}. "
            "For the paper's choice, pass `layers=(0.65, 0.90)`."
        )
    if not any(isinstance(value, float) for value in values):
        if min(values) < 0:
            raise ValueError(f"`layers` expected to be numbers from 0, the embeddings, but got {min(values)}.")
    elif len(values) != 2 or not 0 <= values[0] < values[1] <= 1:
        raise ValueError(
            f"`layers` expected to be two shares of the depth, the lower first, in [0, 1] but got {values}. "
            "For the paper's choice, pass `layers=(0.65, 0.90)`."
        )
    return values


def _body(model: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
    """Return the model without its vocabulary projection, and what else it takes; itself where it has no such part."""
    body = getattr(model, str(getattr(model, "base_model_prefix", "")), None)
    more: dict[str, Any] = {}
    # Parts of a sharded model are gathered by the passes of the whole.
    if not isinstance(body, nn.Module) or is_sharded(model.parameters()):
        body = model
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            more["logits_to_keep"] = 1
    parameters = inspect.signature(body.forward).parameters
    if "output_hidden_states" not in parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        raise ValueError(
            f"`model` expected to give its hidden states but {type(model).__name__} takes no `output_hidden_states`."
        )
    return body, more


def _count_hidden_states(model: nn.Module) -> int:
    config: Any = getattr(model, "config", None)
    # A model of text and pictures keeps the language model's config in its own.
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    layers = getattr(config, "num_hidden_layers", None)
    if not isinstance(layers, int):
        raise ValueError(
            f"`model` expected to say in its config how many layers it has, as `num_hidden_layers`, but "
            f"{type(model).__name__} does not."
        )
    return layers + 1


def _take(states: Tensor, last: Tensor) -> Tensor:
    last = last.to(states.device)
    return states[torch.arange(len(last), device=states.device), last].float().cpu()


def _check_finite(states: Activations, indices: Sequence[int]) -> None:
    for number, values in states.items():
        finite = values.isfinite().all(dim=1)
        if not bool(finite.all()):
            prompt = indices[int((~finite).int().argmax())]
            raise ValueError(
                f"`model` expected to give finite activations but layer {number} gives NaN or infinity for prompt "
                f"{prompt}, counted from 0. A float16 model may overflow: load it as bfloat16 or float32."
            )
