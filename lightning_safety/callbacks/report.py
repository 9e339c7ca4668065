# SPDX-License-Identifier: Apache-2.0
"""A callback that leaves a page on what happened to safety in the run folder."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn

from lightning_safety.callbacks.log import leaves_files, run_folder
from lightning_safety.callbacks.selected import SelectedWeightsCallback
from lightning_safety.files import replace_atomically
from lightning_safety.report import REPORT_FILE, RUN_FILE, check_libraries, describe_run, mask_entry, write_report

_log = logging.getLogger(__name__)


class SafetyReport(pl.Callback):
    """Writes one self-contained HTML page on a run into its folder: what happened, when, where, and against chance.

    The page is written at the end of a fit, also of one that an error or Ctrl-C ends (with what there is so far), and
    after ``validate`` and ``test``. It shows what `HarmfulnessMonitor` and other monitors log, wherever they stand in
    the trainer's list. ``run.json`` beside it holds what the page says of the run itself: versions, machine, trainer
    settings, model, callbacks and where the selected weights are. ``lightning-safety report RUN_DIR`` writes the page
    again, and compares runs.

    A page that cannot be written warns; it never ends a fit. ``fast_dev_run`` writes none. As the page shows replies to
    harmful prompts, only its owner can read it.

    Args:
        filename: The page's name in the run folder.
        title: Its heading. Default: the folder's name.
        replies: Whether it shows sample replies to harmful prompts.

    Raises:
        TypeError: `filename` is not a text.
        ValueError: `filename` is empty.
        ModuleNotFoundError: matplotlib or jinja2 is not installed (when the run begins).
    """

    def __init__(self, filename: str = REPORT_FILE, title: str | None = None, replies: bool = True) -> None:
        if not isinstance(filename, str):
            raise TypeError(
                f"`filename` expected to be a text but got {type(filename).__name__}."
                f' Pass for instance "{REPORT_FILE}".'
            )
        if not filename.strip():
            raise ValueError(
                f'`filename` expected to be the name of a file but it is empty. Pass for instance "{REPORT_FILE}".'
            )
        self.filename = filename
        self.title = title
        self.replies = replies
        self._run: dict[str, Any] | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:  # noqa: ARG002
        """Make sure that the page can be written, before hours are spent on what it should show."""
        check_libraries()
        self._run = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write down what the run is made with; every callback has chosen its weights by now."""
        if not _writes(trainer):
            return
        self._run = {"started": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")}
        self._try("run.json", lambda: self._describe(trainer, pl_module))

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """Write the page; every monitor has made its last check in ``on_train_end``."""
        self._finish(trainer, {"step": trainer.global_step})

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """Write the page after ``trainer.validate``."""
        if trainer.state.fn == "validate" and _writes(trainer):
            self._try("report", lambda: self._write(trainer))

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """Write the page after ``trainer.test``."""
        if _writes(trainer):
            self._try("report", lambda: self._write(trainer))

    def on_exception(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,  # noqa: ARG002
        exception: BaseException,
    ) -> None:
        """Write the page with what there is so far."""
        self._finish(trainer, {"step": trainer.global_step, "exception": type(exception).__name__})

    def _finish(self, trainer: pl.Trainer, outcome: dict[str, Any]) -> None:
        # A run that ends before it began has left nothing, and what an earlier one left is not about it.
        if self._run is None:
            return
        self._run["outcome"] = outcome
        self._try("run.json", lambda: self._save(trainer))
        self._try("report", lambda: self._write(trainer))
        self._run = None

    def _describe(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self._run is not None
        callbacks: list[Any] = list(trainer.callbacks)  # type: ignore[attr-defined]
        names = (getattr(callback, "language_model", None) for callback in callbacks)
        self._run |= describe_run(trainer, pl_module, next((name for name in names if isinstance(name, str)), None))
        if not any(run_folder(trainer).glob("mask*.safetensors")):
            self._run["masks"] = _masks(callbacks)
        self._save(trainer)

    def _save(self, trainer: pl.Trainer) -> None:
        with replace_atomically(run_folder(trainer) / RUN_FILE) as temporary:
            temporary.write_text(json.dumps(self._run, indent=2, allow_nan=False), encoding="utf-8")

    def _write(self, trainer: pl.Trainer) -> None:
        folder = run_folder(trainer)
        page = write_report(folder, output=folder / self.filename, title=self.title, replies=self.replies)
        rank_zero_info(f"{type(self).__name__}: {page}")

    def _try(self, what: str, write: Callable[[], None]) -> None:
        """Do what must not end or mask a fit: an error becomes a warning, and that a line of the log if it is one."""
        try:
            write()
        except Exception as error:
            message = f"{type(self).__name__} could not write its {what}: {error}"
            try:
                rank_zero_warn(message)
            except Warning:
                _log.warning(message)


def _writes(trainer: pl.Trainer) -> bool:
    return leaves_files(trainer) and bool(trainer.is_global_zero)


def _masks(callbacks: list[Any]) -> list[dict[str, Any]]:
    """Return where the weights are that callbacks hold or train, each under a name of its own."""
    entries: list[dict[str, Any]] = []
    for callback in callbacks:
        mask = callback.mask if isinstance(callback, SelectedWeightsCallback) else None
        if mask is not None:
            name = type(callback).__name__
            same = sum(entry["name"].partition(" ")[0] == name for entry in entries)
            entries.append(mask_entry(mask, f"{name} {same + 1}" if same else name))
    return entries
