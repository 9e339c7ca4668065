# SPDX-License-Identifier: Apache-2.0
"""Where the pictures of a check go: loggers that take pictures, else PNG files in the run folder."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl

from lightning_safety.callbacks.log import leaves_files, run_folder
from lightning_safety.files import replace_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIGURES_FOLDER = "safety_figures"
"""Where pictures lie in the run folder if no logger took them: ``<name>-<step>.png``."""


def show_figures(trainer: pl.Trainer, figures: Mapping[str, Callable[[], Figure]]) -> None:
    """Send pictures to every logger that takes them (TensorBoard, Weights & Biases, MLflow), or write PNG files.

    Args:
        trainer: The trainer, on rank zero.
        figures: What draws each picture, by name without ``safety/``.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    if not figures or not leaves_files(trainer):
        return
    loggers: list[Any] = list(trainer.loggers)
    senders = [sender for sender in map(_sender, loggers) if sender is not None]
    for name, draw in figures.items():
        figure = draw()
        for send in senders:
            send(f"safety/{name}", figure, trainer.global_step)
        if not senders:
            path = run_folder(trainer) / FIGURES_FOLDER / f"{name.replace('/', '-')}-{trainer.global_step}.png"
            write_figure(figure, path)


def write_figure(figure: Figure, path: Path) -> None:
    """Write a picture as a PNG file."""
    with replace_atomically(path) as temporary:
        figure.savefig(temporary, format="png")


def _sender(logger: Any) -> Callable[[str, Figure, int], None] | None:
    """Return what sends a figure to a logger, or None where the logger takes none.

    Known by the class's name: some loggers' experiments answer to any attribute.
    """
    kinds = {kind.__name__ for kind in type(logger).__mro__}
    if "TensorBoardLogger" in kinds:
        # close=False: the figure belongs to no state of matplotlib that it could be closed in.
        return lambda name, figure, step: logger.experiment.add_figure(name, figure, step, close=False)
    if "WandbLogger" in kinds:
        return lambda name, figure, step: logger.log_image(name, [_image(figure)], step=step)
    if "MLFlowLogger" in kinds:
        return lambda name, figure, step: logger.experiment.log_figure(
            logger.run_id, figure, f"{name.replace('/', '-')}-{step}.png"
        )
    return None


def _image(figure: Figure) -> Any:
    """Return a figure as a PIL image, which Weights & Biases takes."""
    from PIL import Image

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer)
