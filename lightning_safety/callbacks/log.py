# SPDX-License-Identifier: Apache-2.0
"""Writing what a monitor measures: one point a check, to every logger, to `callback_metrics` and to the run folder."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from lightning_safety.files import replace_atomically

METRICS_FILE = "safety.jsonl"
"""One line a check, in the run folder."""

Entry = dict[str, Any]


def leaves_files(trainer: pl.Trainer) -> bool:
    """Whether a run writes files: a ``fast_dev_run`` writes none, as Lightning has it."""
    return not getattr(trainer, "fast_dev_run", False)


def run_folder(trainer: pl.Trainer) -> Path:
    """Return the folder of this run: the first logger's, or the trainer's root where there is none.

    ``trainer.log_dir`` is None or shared by all runs for loggers that write elsewhere (Weights & Biases, MLflow); their
    name and version then make the folder, as they do for Lightning's checkpoints.
    """
    if not trainer.loggers:
        return Path(trainer.default_root_dir)
    logger = trainer.loggers[0]
    folder = getattr(logger, "log_dir", None)
    if isinstance(folder, str):
        return Path(folder)
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return Path(logger.save_dir or trainer.default_root_dir) / str(logger.name) / version


def log_to_loggers(trainer: pl.Trainer, metrics: Mapping[str, float]) -> None:
    """Send metrics to every logger at the trainer's optimizer step, whatever ``log_every_n_steps`` is."""
    for logger in trainer.loggers:
        logger.log_metrics(dict(metrics), step=trainer.global_step)
        logger.save()


def fill_callback_metrics(
    trainer: pl.Trainer, pl_module: pl.LightningModule, metrics: Mapping[str, float], *, hook_may_log: bool = True
) -> None:
    """Set ``trainer.callback_metrics``, which ModelCheckpoint and EarlyStopping read; no logger gets them from there.

    Args:
        trainer: The trainer.
        pl_module: The module.
        metrics: Values by full name.
        hook_may_log: Whether Lightning allows ``self.log`` in the hook that runs. ``on_train_end`` does not; nothing
            that Lightning itself keeps can overwrite the values then.
    """
    values = {name: torch.tensor(value, dtype=torch.float32) for name, value in metrics.items()}
    if hook_may_log:
        pl_module.log_dict(values, logger=False, batch_size=1, rank_zero_only=True)
    # Reading the property makes Lightning take over what hooks have logged, and what came first may stand last.
    trainer.callback_metrics.update(values)


def record(path: Path, entries: Sequence[Entry], *, replacing: Entry | None = None, mode: int | None = None) -> None:
    """Append entries to a JSON Lines file, each written once.

    A fit that was killed and resumed comes to the same check twice: the second replaces the first. A last line that a
    kill cut short is dropped.

    Args:
        path: The file. Missing parent folders are made.
        entries: Objects that JSON can hold; NaN and infinity become null.
        replacing: Lines that hold all of these items are dropped. None: no line is.
        mode: Permission bits of the file. Default: what the user's umask gives.
    """
    text = "".join(json.dumps(_finite(entry), allow_nan=False) + "\n" for entry in entries)
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    kept = "".join(line for line in re.findall(r"[^\n]*\n", old) if not _holds(line, replacing))
    if kept != old:
        with replace_atomically(path, mode=mode) as temporary:
            temporary.write_text(kept + text, encoding="utf-8")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666 if mode is None else mode)
    with os.fdopen(descriptor, "a", encoding="utf-8") as file:
        file.write(text)


def _holds(line: str, items: Entry | None) -> bool:
    if items is None:
        return False
    try:
        entry = json.loads(line)
    except json.JSONDecodeError:
        return False
    return isinstance(entry, dict) and entry == entry | items


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
