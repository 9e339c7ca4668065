# SPDX-License-Identifier: Apache-2.0
"""Checks on arguments, and the words of the errors they raise."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence


def check_fraction(value: float, name: str = "fraction") -> float:
    """Return `value` as a float if it lies in (0, 1].

    Raises:
        TypeError: `value` is not a number.
        ValueError: `value` is not in (0, 1].

    Example:
        >>> check_fraction(0.01)
        0.01
        >>> check_fraction(5)
        Traceback (most recent call last):
        ...
        ValueError: `fraction` expected to be in (0, 1] but got 5. For the top 5 %, pass `fraction=0.05`.
    """
    of = "the top " if name == "fraction" else ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(
            f"`{name}` expected to be a number in (0, 1] but got {value!r}. For {of}1 %, pass `{name}=0.01`."
        )
    if math.isfinite(value) and 0 < value <= 1:
        return float(value)
    percent = value if math.isfinite(value) and 1 < value <= 100 else 1
    example = f"For {of}{percent:g} %, pass `{name}={percent / 100:g}`."
    raise ValueError(f"`{name}` expected to be in (0, 1] but got {value}. {example}")


def check_positive(value: int, name: str) -> int:
    """Return `value` if it is an integer of at least 1.

    Raises:
        TypeError: `value` is not an integer.
        ValueError: `value` is below 1.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{name}` expected to be an integer of at least 1 but got {value!r}.")
    if value < 1:
        raise ValueError(f"`{name}` expected to be at least 1 but got {value}.")
    return value


def check_choice(value: str, name: str, choices: Sequence[str]) -> None:
    """Make sure that `value` is one of `choices`.

    Raises:
        ValueError: It is not; the message names the closest.

    Example:
        >>> check_choice("to", "method", ["top", "bottom"])
        Traceback (most recent call last):
        ...
        ValueError: `method` expected to be one of 'top', 'bottom' but got 'to'. Did you mean `top` or `bottom`?
    """
    if value not in choices:
        raise ValueError(
            f"`{name}` expected to be one of {', '.join(map(repr, choices))} but got {value!r}."
            f" {closest(str(value), choices)}"
        )


def closest(name: str, choices: Iterable[str], count: int = 3) -> str:
    """Return a sentence that names the choices closest to `name`, or all of them where they are few.

    Example:
        >>> closest("harmfull", ["harmful", "harmless", "borderline"], count=1)
        'Did you mean `harmful`?'
        >>> closest("xyz", ["harmful", "harmless"])
        'Choose from `harmful`, `harmless`.'
    """
    known = list(choices)
    matches = difflib.get_close_matches(name, known, n=count, cutoff=0.5)
    if matches:
        return f"Did you mean {' or '.join(f'`{match}`' for match in matches)}?"
    if not known:
        return "There is nothing to choose from."
    shown = ", ".join(f"`{choice}`" for choice in known[:12])
    more = f", … ({len(known) - 12} more)" if len(known) > 12 else ""
    return f"Choose from {shown}{more}."
