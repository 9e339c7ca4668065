# SPDX-License-Identifier: Apache-2.0
"""Rows of JSON Lines, JSON and CSV files, each with the place it came from."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lightning_safety.arguments import closest

FILE_SUFFIXES = (".jsonl", ".json", ".csv")


class Row(NamedTuple):
    """One row, and where it stands, for messages.

    Attributes:
        values: Column to value.
        origin: The file.
        place: The file and line.
    """

    values: dict[str, Any]
    origin: str
    place: str


def read_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a ``.jsonl``, ``.json`` or ``.csv`` file (UTF-8) as they are read.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The suffix is another, or a row cannot be read; the message gives file and line.
    """
    if not path.is_file():
        names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        found = [name for name in names if name.endswith(FILE_SUFFIXES)]
        fault = "it is a folder" if path.is_dir() else "there is no such file"
        hint = f" {closest(path.name, sorted(found))}" if found else ""
        raise FileNotFoundError(f"Prompts expected in the file {str(path)!r} but {fault}.{hint}")
    readers = {".jsonl": _read_json_lines, ".json": _read_json, ".csv": _read_csv}
    suffix = path.suffix.lower()
    if suffix not in readers:
        raise ValueError(f"Prompts expected in a {', '.join(FILE_SUFFIXES)} file but got {str(path)!r}.")
    try:
        yield from readers[suffix](path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} expected to be UTF-8 text but {error}.") from None


def _read_json_lines(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                place = f"{path}:{number}"
                try:
                    value = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{place} expected to be a JSON object but {error}.") from None
                yield Row(_check_object(value, place), str(path), place)


def _read_json(path: Path) -> Iterator[Row]:
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno} expected to be JSON but {error}.") from None
    if not isinstance(values, list):
        raise ValueError(f"{path} expected to hold a JSON list of objects but holds {_json_type(values)}.")
    for number, value in enumerate(values, start=1):
        place = f"{path}, item {number}"
        yield Row(_check_object(value, place), str(path), place)


def _read_csv(path: Path) -> Iterator[Row]:
    # newline="" as the csv module asks: it reads line breaks inside quotes itself.
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, strict=True)
        while True:
            try:
                values = next(reader, None)
            except csv.Error as error:
                raise ValueError(f"{path}:{reader.reader.line_num} expected to be CSV but {error}.") from None
            if values is None:
                return
            place = f"{path}:{reader.line_num}"
            if None in values or None in values.values():
                expected = len(reader.fieldnames or ())
                raise ValueError(f"{place} expected to have {expected} cells like the header. Quote text with commas.")
            yield Row(values, str(path), place)


def _check_object(value: object, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{place} expected to be a JSON object but is {_json_type(value)}.")
    return value


def _json_type(value: object) -> str:
    names = {list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number", dict: "an object"}
    return names.get(type(value), "null")
