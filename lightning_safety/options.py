# SPDX-License-Identifier: Apache-2.0
"""How the options of a command are read: unknown names suggest the closest, lists may be written as words."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

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


def parser_of(
    function: Callable[..., None],
    command: str,
    *,
    description: str | None = None,
    as_positional: bool = False,
    skip: set[str | int] | None = None,
) -> SuggestingParser:
    """Return a parser whose options are a function's arguments, and ``--config`` for a file of them.

    Args:
        function: What the command runs.
        command: The words after ``lightning-safety``.
        description: What its help opens with.
        as_positional: Whether arguments without a default are words of their own, without an option's name.
        skip: Arguments to leave out.
    """
    parser = SuggestingParser(prog=f"lightning-safety {command}", description=description)
    parser.add_argument("--config", action="config", help="A YAML file with any of the options below.")
    parser.add_function_arguments(function, as_group=False, as_positional=as_positional, skip=skip)
    return parser


def read_options(parser: SuggestingParser, function: Callable[..., None], words: Sequence[str]) -> dict[str, Any]:
    """Return the arguments of a function by the words of a command line; classes named in them are instantiated.

    Several words may follow an option that takes a list of texts: ``--compare A B``.

    Args:
        parser: What `parser_of` returned for `function`.
        function: What the command runs.
        words: The command's options.
    """
    options: dict[str, Any] = parser.instantiate_classes(parser.parse_args(_gather_lists(function, words))).as_dict()
    options.pop("config", None)
    return options


def _gather_lists(function: Callable[..., None], words: Sequence[str]) -> list[str]:
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
