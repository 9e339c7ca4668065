# SPDX-License-Identifier: Apache-2.0
"""Where the replies to harmful prompts go: a private file of the run folder and, only if asked, loggers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn

from lightning_safety.callbacks.log import Entry, record
from lightning_safety.monitoring import CONTENT_WARNING

REPLIES_FILE = "safety_replies.jsonl"
"""The replies of every check, in the run folder, readable by their owner alone."""


def record_replies(folder: Path, entries: Sequence[Entry], *, replacing: Entry | None) -> None:
    """Append the replies of a check to the file of replies, below its content warning.

    Args:
        folder: The run folder.
        entries: The replies.
        replacing: Replies in the file that hold all of these items are dropped first. None: no reply is.
    """
    path = folder / REPLIES_FILE
    opening = [] if path.exists() else [{"content_warning": CONTENT_WARNING}]
    record(path, [*opening, *entries], replacing=replacing, mode=0o600)


def announce_reply_loggers(trainer: pl.Trainer) -> None:
    """Say which loggers the replies will go to."""
    taking = [type(logger).__name__ for logger in trainer.loggers if _text_writer(logger) is not None]
    others = [type(logger).__name__ for logger in trainer.loggers if _text_writer(logger) is None]
    if not taking:
        rank_zero_warn(
            f"`log_replies=True` expected a logger that takes text (TensorBoard, Weights & Biases) but the trainer has "
            f"{', '.join(others) or 'none'}. The replies are in {REPLIES_FILE} of the run folder only."
        )
        return
    without = f" {', '.join(others)} takes no text." if others else ""
    rank_zero_info(f"Replies to harmful prompts are sent to {', '.join(taking)}.{without}")


def send_replies(trainer: pl.Trainer, entries: Sequence[Entry]) -> None:
    """Send the replies of a check to every logger that takes text."""
    columns = ["prompts", "prompt", "response"]
    rows = [[str(entry[column]) for column in columns] for entry in entries]
    loggers: list[Any] = list(trainer.loggers)
    for logger in loggers:
        writer = _text_writer(logger)
        if writer == "table":
            logger.log_text("safety/replies", columns=columns, data=rows, step=trainer.global_step)
        elif writer == "text":
            # Indented by four, a line is code to Markdown: nothing a model writes is interpreted.
            text = "\n\n".join("\n".join("    " + line for line in "\n".join(row).splitlines()) for row in rows)
            logger.experiment.add_text("safety/replies", text, trainer.global_step)


def _text_writer(logger: Any) -> str | None:
    """Return how a logger takes text: Weights & Biases as a table, TensorBoard as text; None: not at all."""
    if callable(getattr(logger, "log_text", None)):
        return "table"
    # Not `hasattr` on every logger's experiment: some answer to any name.
    return "text" if type(logger).__name__ == "TensorBoardLogger" else None
