# SPDX-License-Identifier: Apache-2.0
"""How the options of a command are read: unknown names suggest the closest, lists may be written as words."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from typing import NoReturn

from lightning_safety.arguments import closest

try:
    from jsonargparse import ArgumentParser
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("The command line needs jsonargparse: pip install 'lightning-safety[cli]'.") from error


class SuggestingParser(ArgumentParser):
    """An argument parser that names the closest option when one is unknown."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Add the closest option names to a message about unknown ones."""
        unknown = re.findall(r"--([\w.-]+)", message) if "nrecognized" in message or "not accepted" in message else []
        known = [option for action in self._actions for option in action.option_strings if option.startswith("--")]
        for option in unknown:
            message += f" {closest(f'--{option}', known)}"
        super().error(message, ex)
        raise AssertionError("ArgumentParser.error returns never")


def gather_lists(function: Callable[..., None], words: Sequence[str]) -> list[str]:
    """Return the words so that several may follow an option that takes a list of texts: ``--compare A B``.

    Args:
        function: Its parameters are the options; those annotated as lists of texts may be followed by several words.
        words: Of a command line.

    Example:
        >>> def compare(names: list[str]) -> None: ...
        >>> gather_lists(compare, ["--names", "a", "b"])
        ['--names+=a', '--names+=b']
    """
    parameters = inspect.signature(function).parameters.values()
    lists = {f"--{parameter.name}" for parameter in parameters if "list[str]" in str(parameter.annotation)}
    found: list[str] = []
    option = ""
    for word in words:
        name, _, value = word.partition("=")
        if word.startswith("-"):
            option = name if name in lists else ""
        if not option:
            found.append(word)
        elif word != option:
            # A list in brackets is YAML; to a single text jsonargparse appends by a plus sign.
            one = value if word.startswith("-") else word
            found.append(f"{option}={one}" if one.startswith("[") else f"{option}+={one}")
    return found
