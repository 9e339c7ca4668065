# SPDX-License-Identifier: Apache-2.0
"""LightningCLI for this package: ``fit``, ``validate``, ``test`` as Lightning has them, and ``study``."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
from lightning_utilities.core.imports import module_available
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI

from lightning_safety.arguments import check_choice
from lightning_safety.options import parser_of, read_options
from lightning_safety.recipes import recipe_path
from lightning_safety.training.precision import fast_precision
from lightning_safety.training.studies import STUDIES
from lightning_safety.training.study import run_study

# Any module and data module can be named in a configuration, the user's own too.
CLASSES: dict[str, Any] = {
    "model_class": pl.LightningModule,
    "datamodule_class": pl.LightningDataModule,
    "subclass_mode_model": True,
    "subclass_mode_data": True,
    "seed_everything_default": 0,
    "save_config_kwargs": {"overwrite": True},
}


class StudyCommand(LightningCLI):
    """LightningCLI that leaves the fit to `run_study` and puts every log into one run folder."""

    log_folder = "log"

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options of the study itself."""
        parser.add_argument(
            "--bfloat16",
            type=Literal["auto", "never"],
            default="never",
            help="auto: without --trainer.precision, fit under bfloat16 autocast where the processor computes in it.",
        )
        parser.add_argument("--control", action="store_true", help="Fit again with a random mask of the same size.")
        parser.add_argument("--output", type=str | None, help="The run folder. Default: runs/<name>-<date>-<time>.")
        parser.add_argument("--limit", type=int | None, help="At most so many prompts of each set.")
        parser.add_argument("--max_new_tokens", type=int, default=24, help="Length of a judged reply, in tokens.")
        parser.add_argument("--evaluation_batch_size", type=int, default=32, help="Replies generated at a time.")

    def before_instantiate_classes(self) -> None:
        """Choose precision and run folder, and send Lightning's loggers there."""
        config = self.config
        if config.bfloat16 == "auto" and config.trainer.precision is None:
            config.trainer.precision = fast_precision(str(config.trainer.accelerator))
            print(f"Precision of the fit: {config.trainer.precision}", flush=True)
        if config.output is None:
            name = Path(str(config.config[0])).stem if config.config else "study"
            config.output = str(Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}")
        config.trainer.default_root_dir = config.output
        config.trainer.logger = [_logger("CSVLogger", config.output, self.log_folder)]
        if module_available("tensorboard"):
            config.trainer.logger.append(_logger("TensorBoardLogger", config.output, self.log_folder))


class ControlCommand(StudyCommand):
    """The same again, for the fit with a random mask."""

    log_folder = "log-random-mask"


def run(command: str, words: Sequence[str]) -> None:
    """Run a command that trains.

    Args:
        command: ``"fit"``, ``"validate"``, ``"test"`` or ``"study"``.
        words: Its options.
    """
    # Lightning warns of words that do not come from the process's own command line; these do, less the first.
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
    if command != "study":
        LightningCLI(**CLASSES, args=[command, *words])
        return

    study = StudyCommand(**CLASSES, save_config_callback=None, run=False, args=list(words))
    # The control must not choose a run folder of its own.
    control_words = [*words, f"--output={study.config.output}"]

    def make_control() -> StudyCommand:
        return ControlCommand(**CLASSES, save_config_callback=None, run=False, args=control_words)

    run_study(
        study,
        make_control if study.config.control else None,
        output=Path(study.config.output),
        limit=study.config.limit,
        max_new_tokens=study.config.max_new_tokens,
        batch_size=study.config.evaluation_batch_size,
    )


def run_named_study(name: str, words: Sequence[str]) -> None:
    """Run one of `STUDIES`.

    Raises:
        ValueError: There is no such study.
    """
    options = parse_study(name, words)
    STUDIES[name](**options)


def parse_study(name: str, words: Sequence[str]) -> dict[str, Any]:
    """Return the arguments of a study: the settings of its recipe, and over them the files and options given.

    ``--full`` is short for ``--hours null``: all cells, however long they take.

    Raises:
        ValueError: There is no such study.
    """
    check_choice(name, "study", list(STUDIES))
    function = STUDIES[name]
    words = ["--hours=null" if word == "--full" else word for word in words]
    defaults = ["--config", str(recipe_path(f"studies/{name}"))]
    return read_options(parser_of(function, f"study {name}"), function, [*defaults, *words])


def _logger(name: str, folder: str, log_folder: str) -> dict[str, Any]:
    # No `lightning_logs/version_0` to dig through.
    return {
        "class_path": f"pytorch_lightning.loggers.{name}",
        "init_args": {"save_dir": folder, "name": "", "version": log_folder},
    }
