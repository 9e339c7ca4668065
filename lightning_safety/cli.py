# SPDX-License-Identifier: Apache-2.0
"""The command line: ``lightning-safety …``."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from lightning_safety import commands
from lightning_safety.arguments import closest
from lightning_safety.options import parser_of, read_options
from lightning_safety.recipes import recipe_command

# Commands that train are LightningCLI's own; the others are functions whose arguments become options.
TRAINING = ("fit", "validate", "test", "study")
FUNCTIONS: dict[str, Callable[..., None]] = {
    "score": commands.score,
    "evaluate": commands.evaluate,
    "report": commands.report,
    "results": commands.results,
    "export": commands.export,
    "subspace": commands.subspace,
    "project": commands.project,
    "judge agreement": commands.judge_agreement,
    "mask describe": commands.mask_describe,
    "patch apply": commands.patch_apply,
    "patch revert": commands.patch_revert,
    "patch info": commands.patch_info,
    "recipes ls": commands.recipes_ls,
    "recipes show": commands.recipes_show,
    "recipes cp": commands.recipes_cp,
}
# Several checkpoints in a row are easily mixed up: these are named.
NAMED = ("subspace", "project")
SUMMARIES = {
    "fit": "Train with PyTorch Lightning: LightningCLI with this package's module, data and callbacks.",
    "validate": "LightningCLI's validate.",
    "test": "LightningCLI's test.",
    "study": "Evaluate, fit, evaluate again and report, beside a random-mask control if asked for.",
    "recipes run": "Run the command that a recipe opens with; further words are added to it.",
} | {name: (function.__doc__ or "").splitlines()[0] for name, function in FUNCTIONS.items()}

# What a wrong argument or file raises; anything else is a defect and keeps its traceback.
USER_ERRORS = (ValueError, TypeError, OSError, ImportError, MemoryError)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        arguments: The words after ``lightning-safety``; default: those of the process.

    Raises:
        SystemExit: With code 2 for wrong arguments, 1 for an error in a file or model they name.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview())
        return
    if words[0] == "--version":
        from lightning_safety import __version__

        print(__version__)
        return
    if words[:2] == ["recipes", "run"]:
        _run_recipe(words[2:])
        return
    if words[0] in TRAINING:
        from lightning_safety.training import command_line

        if words[0] == "study" and len(words) > 1 and not words[1].startswith("-"):
            _report_errors(command_line.run_named_study, words[1], words[2:])
        else:
            command_line.run(words[0], words[1:])
        return
    name = " ".join(words[:2]) if " ".join(words[:2]) in FUNCTIONS else words[0]
    if name not in FUNCTIONS:
        _fail(2, f"unknown command `{' '.join(words[:2])}`. {closest(' '.join(words[:2]), SUMMARIES)}")
    _call(name, words[len(name.split()) :])


def _call(name: str, words: list[str]) -> None:
    """Parse `words` by the signature of a command's function, and call it."""
    function = FUNCTIONS[name]
    output = inspect.signature(function).parameters.get("output")
    skip: set[str | int] | None = {"output"} if output else None
    parser = parser_of(function, name, description=SUMMARIES[name], as_positional=name not in NAMED, skip=skip)
    if output is not None:
        required = output.default is inspect.Parameter.empty
        default = None if required else output.default
        parser.add_argument("-o", "--output", type=str | None, required=required, default=default, help="Target.")
    _report_errors(function, **read_options(parser, function, words))


def _report_errors(function: Callable[..., None], *arguments: Any, **options: Any) -> None:
    try:
        function(*arguments, **options)
    except USER_ERRORS as error:
        _fail(1, str(error))


def _run_recipe(words: list[str]) -> None:
    """Run the command that a recipe opens with, with the user's further words behind it."""
    if not words or words[0].startswith("-"):
        _fail(2, "`recipes run` expected the name of a recipe. `lightning-safety recipes ls` lists them.")
    try:
        command = recipe_command(words[0])
    except ValueError as error:
        _fail(2, str(error))
    main([*command, *words[1:]])


def _overview() -> str:
    width = max(map(len, SUMMARIES))
    listing = "\n".join(f"  {name:<{width}}  {summary}" for name, summary in SUMMARIES.items())
    return (
        "usage: lightning-safety COMMAND [options]\n\n"
        f"commands:\n{listing}\n\n"
        "`lightning-safety COMMAND --help` lists the options of a command; `--print_config` prints them as YAML."
    )


def _fail(code: int, message: str) -> NoReturn:
    print(f"lightning-safety: error: {message}", file=sys.stderr)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
