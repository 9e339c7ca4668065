# SPDX-License-Identifier: Apache-2.0
"""Prompts with their written responses: the built-in sets, a file, or a data set on the hub."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from lightning_safety.arguments import check_positive, closest
from lightning_safety.data.files import FILE_SUFFIXES, Row, read_rows

BUILT_IN_SETS = ("harmful", "harmless", "borderline")
"""The sets written for this package: harmful with refusals, harmless and borderline with good answers."""

SPLITS = ("score", "train", "monitor", "test")
"""The disjoint splits of every built-in set; ``borderline`` has no ``score``."""

_PROMPTS_FOLDER = Path(__file__).parent / "prompts"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Example:
    """One prompt, and what is known about it.

    Attributes:
        prompt: What the user says.
        response: The reply written for it (a refusal for a harmful prompt), or None.
        category: The hazard or topic, or None.
    """

    prompt: str
    response: str | None = None
    category: str | None = None


def load_prompts(
    source: str | os.PathLike[str],
    *,
    split: str | None = None,
    prompt_column: str = "prompt",
    response_column: str | None = "response",
    limit: int | None = None,
) -> list[Example]:
    """Load prompts, in the order in which they are stored.

    Args:
        source: A built-in set (``"harmful"``, ``"harmless"``, ``"borderline"``), the path of a ``.jsonl``, ``.json`` (a
            list of objects) or ``.csv`` file, or a data set on the hub as ``"owner/name"``.
        split: For a built-in set, which of ``SPLITS`` (needed: the splits must never be mixed by accident). For a file,
            the rows whose ``split`` column says so; default: all rows. For a hub data set, its split; needed
            unless it has just one.
        prompt_column: The column that holds the prompt.
        response_column: The column that holds the response. The default may be absent; another name may not. None: load
            no responses. A blank response counts as none.
        limit: Load only the first so many.

    Returns:
        At least one example. ``category`` comes from the column of that name, if there is one.

    Raises:
        TypeError: `source` is neither a string nor a path.
        FileNotFoundError: There is no such file, or the hub data set could not be loaded.
        ValueError: Unknown set, split or column (the message lists those there are), a bad row (the message gives file
            and line), or nothing was found.

    Example:
        >>> load_prompts("harmfull", split="score")
        Traceback (most recent call last):
        ...
        ValueError: `source` expected to be a built-in prompt set, a .jsonl, .json, .csv file or a hub data set \
"owner/name" but got 'harmfull'. Did you mean `harmful` or `harmless`?
    """
    if not isinstance(source, str | os.PathLike):
        raise TypeError(
            f"`source` expected to be the name of a prompt set or a path but got {type(source).__name__}. "
            f"The built-in sets are {', '.join(BUILT_IN_SETS)}."
        )
    if limit is not None:
        check_positive(limit, "limit")
    examples = _read_examples(_find_rows(source, split), prompt_column, response_column)
    found = list(examples if limit is None else islice(examples, limit))
    if not found:
        raise ValueError(f"`source` expected to hold at least one prompt but {os.fspath(source)!r} is empty.")
    return found


def _find_rows(source: str | os.PathLike[str], split: str | None) -> Iterable[Row]:
    if isinstance(source, str) and source in BUILT_IN_SETS:
        # An empty name makes the message list all splits.
        return _rows_of_split(
            read_rows(_PROMPTS_FOLDER / f"{source}.jsonl"), split or "", f"the built-in set {source!r}"
        )
    path = Path(source).expanduser()
    if path.suffix.lower() in FILE_SUFFIXES or path.exists() or not isinstance(source, str):
        return read_rows(path) if split is None else _rows_of_split(read_rows(path), split, str(path))
    if _HUB_ID.fullmatch(source) and not path.parent.is_dir():
        return _hub_rows(source, split)
    raise ValueError(
        f"`source` expected to be a built-in prompt set, a {', '.join(FILE_SUFFIXES)} file or a hub data set "
        f'"owner/name" but got {source!r}. {closest(source, BUILT_IN_SETS)}'
    )


def _rows_of_split(rows: Iterable[Row], split: str, place: str) -> Iterator[Row]:
    seen: dict[str, None] = {}
    for row in rows:
        if "split" not in row.values:
            raise ValueError(
                f"`split` expected to be None for prompts without a `split` column but got {split!r} "
                f"({row.place} has the columns {_list_columns(row.values)})."
            )
        name = str(row.values["split"])
        seen[name] = None
        if name == split:
            yield row
    if seen and split not in seen:
        raise ValueError(
            f"`split` expected to be one of the splits of {place} but got {split or None!r}. {closest(split, seen)}"
        )


def _read_examples(rows: Iterable[Row], prompt_column: str, response_column: str | None) -> Iterator[Example]:
    rows = iter(rows)
    first = next(rows, None)
    if first is None:
        return
    for argument, column in (("prompt_column", prompt_column), ("response_column", response_column)):
        optional = column is None or (argument == "response_column" and column == "response")
        if column not in first.values and not optional:
            raise ValueError(
                f"`{argument}` expected to be one of the columns {_list_columns(first.values)} of {first.origin} "
                f"but got {column!r}."
            )
    for row in chain([first], rows):
        prompt = _read_text(row, prompt_column)
        if prompt is None:
            raise ValueError(f"`{prompt_column}` expected to be text but is missing or blank at {row.place}.")
        response = None if response_column is None else _read_text(row, response_column)
        category = row.values.get("category")
        yield Example(prompt, response, None if category is None else str(category))


def _read_text(row: Row, column: str) -> str | None:
    """Return the text in `column`, or None where it is absent or blank."""
    value = row.values.get(column)
    if value is None:
        return None
    if not isinstance(value, str):
        raise ValueError(f"`{column}` expected to be text but got {type(value).__name__} at {row.place}.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"`{column}` expected to be valid Unicode at {row.place} but {error}.") from None
    return value if value.strip() else None


def _list_columns(values: Mapping[str, Any]) -> str:
    return ", ".join(f"`{column}`" for column in values)


def _hub_rows(source: str, split: str | None) -> Iterator[Row]:
    import datasets

    try:
        loaded = datasets.load_dataset(source, split=split)
    except OSError as error:
        raise FileNotFoundError(f"The data set {source!r} could not be loaded from the hub: {error}") from error
    except ValueError as error:
        raise ValueError(f"The split {split!r} of the data set {source!r} could not be loaded: {error}") from error
    if isinstance(loaded, Mapping):
        if len(loaded) != 1:
            raise ValueError(f"`split` expected to be one of {_list_columns(loaded)} of {source!r} but got None.")
        loaded = next(iter(loaded.values()))
    for index, values in enumerate(loaded):
        yield Row(dict(values), f"the data set {source!r}", f"row {index} of the data set {source!r}")
