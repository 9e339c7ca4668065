# SPDX-License-Identifier: Apache-2.0
"""Where pictures go: to loggers that take them, else to files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from matplotlib.figure import Figure
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_safety.callbacks.figures import FIGURES_FOLDER, show_figures
from tests.callbacks.fits import make_trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*(litlogger|log_every)")


def draw() -> Figure:
    figure = Figure(figsize=(1, 1))
    figure.subplots().plot([0, 1])
    return figure


def show(folder: Path, loggers: Any, **options: Any) -> None:
    show_figures(make_trainer(folder, logger=loggers, **options), {"subspace_overlap": draw})


def test_without_a_logger_that_takes_pictures_they_are_files(tmp_path: Path) -> None:
    show(tmp_path, CSVLogger(tmp_path, version=0))
    (path,) = (tmp_path / "lightning_logs" / "version_0" / FIGURES_FOLDER).iterdir()
    assert path.name == "subspace_overlap-0.png"
    assert path.read_bytes().startswith(b"\x89PNG")


def test_tensorboard_takes_them(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, version=0)
    show(tmp_path, [CSVLogger(tmp_path, version=1), logger])
    logger.experiment.flush()
    events = EventAccumulator(logger.log_dir, size_guidance={"images": 0}).Reload()
    (image,) = events.Images("safety/subspace_overlap")
    assert image.step == 0
    assert image.encoded_image_string.startswith(b"\x89PNG")
    assert not list(tmp_path.rglob(FIGURES_FOLDER))


@pytest.mark.parametrize("kind", ["WandbLogger", "MLFlowLogger"])
def test_other_loggers_take_them_in_their_own_way(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    def record(*values: Any, **options: Any) -> None:
        calls.append((*values, options))

    methods: dict[str, Callable[..., None]] = {"log_image": lambda self, *v, **o: record(*v, **o)}
    logger = type(kind, (), methods)()
    logger.experiment = SimpleNamespace(log_figure=record)
    logger.run_id = "run"
    trainer = make_trainer(tmp_path)
    monkeypatch.setattr(type(trainer), "loggers", property(lambda self: [logger]))
    show_figures(trainer, {"subspace_overlap": draw})
    (call,) = calls
    if kind == "WandbLogger":
        name, (image,), options = call
        assert (name, options) == ("safety/subspace_overlap", {"step": 0})
        assert image.size == (100, 100)
    else:
        assert call[0] == "run"
        assert isinstance(call[1], Figure)
        assert call[2:] == ("safety-subspace_overlap-0.png", {})


def test_nothing_is_drawn_for_a_fast_dev_run(tmp_path: Path) -> None:
    def refuse() -> Figure:
        raise AssertionError("drawn")

    show_figures(make_trainer(tmp_path, fast_dev_run=True), {"subspace_overlap": refuse})
    assert list(tmp_path.iterdir()) == []
