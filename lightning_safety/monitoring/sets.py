# SPDX-License-Identifier: Apache-2.0
"""The prompts of an evaluation, named as a person or a YAML file names them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_safety.arguments import check_positive, closest
from lightning_safety.data import BUILT_IN_SETS, Example, load_prompts

# Text last: jsonargparse takes the first that fits, and everything can be text.
PromptSource = Sequence[Example] | Mapping[str, Any] | os.PathLike[str] | str
"""A built-in set, a file or a hub data set; a mapping of what `load_prompts` takes; or examples."""

_LOADING_KEYS = ("source", "split", "prompt_column", "response_column", "limit")


def read_prompts(
    source: PromptSource, argument: str, *, split: str, limit: int | None = None
) -> tuple[str, list[Example]]:
    """Load prompts and name them.

    Args:
        source: Where they come from.
        argument: The name of the caller's argument, for messages.
        split: The split of a built-in set that does not say its own; other sources are read whole.
        limit: At most so many, spread evenly: the built-in sets are sorted by category.

    Returns:
        The name of the set (such as ``"harmful/test"``) and at least one example.

    Raises:
        TypeError: `source` is of another kind.
        ValueError: It is empty or has unknown keys, or `load_prompts` cannot read it.

    Example:
        >>> name, examples = read_prompts("harmful", "harmful", split="monitor", limit=2)
        >>> name, [example.category for example in examples]
        ('harmful/monitor', ['theft_burglary', 'counterfeiting_forgery'])
    """
    if isinstance(source, str | os.PathLike):
        source = {"source": source}
    if isinstance(source, Mapping):
        name, examples = _load(dict(source), argument, split)
    elif isinstance(source, Sequence) and not isinstance(source, str) and all(map(_is_example, source)):
        name, examples = argument, list(source)
    else:
        raise TypeError(
            f"`{argument}` expected to be a prompt set's name or path, a mapping with the key `source`, or a list of "
            f"Example, but got {source!r:.200}."
        )
    if not examples:
        raise ValueError(f"`{argument}` expected to hold at least one prompt but it is empty.")
    return name, examples if limit is None else spread(examples, check_positive(limit, "limit"))


def spread(examples: Sequence[Example], count: int) -> list[Example]:
    """Return `count` of the examples, or all where there are no more, evenly spaced and in order."""
    if count >= len(examples):
        return list(examples)
    # The middle of each of `count` equal stretches.
    return [examples[(2 * index + 1) * len(examples) // (2 * count)] for index in range(count)]


def _is_example(value: object) -> bool:
    return isinstance(value, Example)


def _load(loading: dict[str, Any], argument: str, split: str) -> tuple[str, list[Example]]:
    for key in loading:
        if key not in _LOADING_KEYS:
            raise ValueError(
                f"`{argument}` expected the keys {', '.join(f'`{known}`' for known in _LOADING_KEYS)} but got `{key}`. "
                f"{closest(str(key), _LOADING_KEYS)}"
            )
    if "source" not in loading:
        raise ValueError(f"`{argument}` expected the key `source` but got {loading!r:.200}.")
    source = loading.pop("source")
    if source in BUILT_IN_SETS:
        loading = {"split": split, **loading}
    name = os.fspath(source) if loading.get("split") is None else f"{os.fspath(source)}/{loading['split']}"
    return name, load_prompts(source, **loading)
