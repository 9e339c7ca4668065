# SPDX-License-Identifier: Apache-2.0
"""Figures that touch no global state of matplotlib, which is an extra."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def has_matplotlib() -> bool:
    """Return whether figures can be drawn."""
    return importlib.util.find_spec("matplotlib") is not None


def check_matplotlib(what: str, otherwise: str = "") -> None:
    """Raise ModuleNotFoundError unless figures can be drawn, for callers that draw after long work.

    Args:
        what: What needs it, for the message.
        otherwise: What the user can do instead of installing it.
    """
    if not has_matplotlib():
        raise _missing(what, otherwise)


def new_figure(width: float, height: float, *, dpi: int = 150, background: str = "white") -> Figure:
    """Return an empty figure of so many inches that can be saved; its layout keeps labels of any length inside.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise _missing("A figure") from error
    figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained", facecolor=background)
    FigureCanvasAgg(figure)
    return figure


def _missing(what: str, otherwise: str = "") -> ModuleNotFoundError:
    return ModuleNotFoundError(
        f"{what} needs matplotlib, which is not installed. Install it with"
        f" `pip install 'lightning-safety[report]'`{f', or {otherwise}' if otherwise else ''}."
    )
