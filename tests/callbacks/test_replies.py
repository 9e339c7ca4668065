# SPDX-License-Identifier: Apache-2.0
"""Where the replies to harmful prompts go, and where they do not."""

from __future__ import annotations

import logging
import stat
from pathlib import Path
from typing import Any

import pytest
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from lightning_safety.monitoring import CONTENT_WARNING
from tests.callbacks.fits import HARMFUL, fit, make_monitor, read_lines

pytestmark = pytest.mark.filterwarnings("ignore:.*(litlogger|not have many workers|log_every|not empty)")


def test_replies_stay_in_a_private_file_of_the_run(tiny_tokenizer: Any, tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    fit(tiny_tokenizer, tmp_path, [make_monitor(every_n_steps=None)], max_steps=1, logger=logger)
    path = Path(logger.log_dir) / "safety_replies.jsonl"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    first, *replies = read_lines(path.parent, path.name)
    assert first == {"content_warning": CONTENT_WARNING}
    assert [(reply["step"], reply["prompt"]) for reply in replies[:5]] == [(0, example.prompt) for example in HARMFUL]
    assert len(replies) == 2 * 10
    assert replies[0]["verdicts"]["scripted"]["harmful"] is False
    assert EventAccumulator(logger.log_dir).Reload().Tags()["tensors"] == []


def test_replies_go_to_loggers_only_if_asked_and_it_is_said_to_which(
    tiny_tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loggers = [TensorBoardLogger(tmp_path), CSVLogger(tmp_path)]
    monitor = make_monitor(every_n_steps=None, at_end=False, log_replies=True)
    with caplog.at_level(logging.INFO, logger="pytorch_lightning"):
        fit(tiny_tokenizer, tmp_path, [monitor], max_steps=1, logger=loggers)
    assert "Replies to harmful prompts are sent to TensorBoardLogger. CSVLogger takes no text." in caplog.text
    [event] = EventAccumulator(loggers[0].log_dir).Reload().Tensors("safety/replies/text_summary")
    text = event.tensor_proto.string_val[0].decode()
    assert event.step == 0
    assert all(example.prompt in text for example in HARMFUL)
    # Indented by four, to Markdown it is code: nothing that a model writes is interpreted.
    assert all(line.startswith("    ") for line in text.splitlines() if line)


def test_log_replies_without_a_logger_for_text_warns(tiny_tokenizer: Any, tmp_path: Path) -> None:
    monitor = make_monitor(every_n_steps=None, log_replies=True)
    with pytest.warns(UserWarning, match="expected a logger that takes text .* but the trainer has CSVLogger"):
        fit(tiny_tokenizer, tmp_path, [monitor], max_steps=1, logger=CSVLogger(tmp_path))
