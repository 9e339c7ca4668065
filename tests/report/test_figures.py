# SPDX-License-Identifier: Apache-2.0
"""The pictures of the report: curves with gaps, bands and budgets, and the heatmap."""

from __future__ import annotations

import io
import math
from base64 import b64decode
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib import colors, pyplot

from lightning_safety.report.checks import Point
from lightning_safety.report.colours import DARK, LIGHT
from lightning_safety.report.figures import Heatmap, draw_panel, draw_pictures
from lightning_safety.report.measures import Measure
from lightning_safety.report.panels import Line, Panel
from lightning_safety.scoring import SafetyMask


def line(values: list[float | None], **options: Any) -> Line:
    points = [
        Point(step, Measure(value, value and value - 0.1, value and value + 0.1)) for step, value in enumerate(values)
    ]
    return Line("a", tuple(points), **{"colour": 0, **options})


def pixels(address: str) -> np.ndarray:
    return pyplot.imread(io.BytesIO(b64decode(address.partition(",")[2])))


@pytest.mark.parametrize(
    "lines",
    [
        [line([0.2, None, 0.4])],
        [line([0.2])],
        [line([None, None])],
        [line([0.5] * 200), line([0.4] * 200, colour=13, control=True)],
    ],
)
def test_a_picture_by_day_and_one_in_the_dark(lines: list[Line], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_safety.report.figures._DPI", 50)
    before = dict(matplotlib.rcParams)
    picture = draw_pictures(Panel("Title", "", tuple(lines), {"a": 0.7}, is_rate=True))
    for address, colours in ((picture.light, LIGHT), (picture.dark, DARK)):
        found = pixels(address)
        assert found.shape[0] * picture.width == pytest.approx(found.shape[1] * picture.height, rel=0.02)
        assert found[0, 0, :3] == pytest.approx(colors.to_rgb(colours.card), abs=0.01)
    assert dict(matplotlib.rcParams) == before
    assert pyplot.get_fignums() == []


def test_a_gap_is_not_drawn_over() -> None:
    axes = draw_panel(Panel("Title", "", (line([0.2, None, 0.4]),), {"a": 0.35}), LIGHT).axes[0]
    assert [value for value in axes.lines[0].get_ydata() if not math.isnan(value)] == [0.2, 0.4]
    assert axes.lines[-1].get_ydata() == [0.35, 0.35]
    assert len(axes.collections[0].get_paths()) in (0, 2)


def test_what_is_said_of_a_curve() -> None:
    assert line([0.2, 0.9, None, 0.1, 0.4]).words == (
        "a: 0.20 [0.10, 0.30] at step 0, 0.40 [0.30, 0.50] at step 4, highest 0.90 at step 1, lowest 0.10 at step 3"
        " (5 checks, 1 without a value)"
    )
    assert line([0.2]).words == "a: 0.20 [0.10, 0.30] at step 0 (1 check)"
    assert line([None]).words == "a: nothing could be measured"


@pytest.mark.parametrize("selected", [0, 3])
def test_a_heatmap_draws_any_name(selected: int) -> None:
    shapes = {"layers.0.$x^{.weight": (2, 4), "layers.1.v_proj.weight": (2, 4)}
    indices = {name: torch.arange(selected * (place == 1)) for place, name in enumerate(shapes)}
    heatmap = Heatmap("run", "mask", SafetyMask(indices, shapes).describe())
    picture = draw_pictures(heatmap)
    assert pixels(picture.light).shape == pixels(picture.dark).shape
    assert "By component: v " in heatmap.words
    assert ("Highest: layer 1 v 2.00." if selected else "Highest: none.") in heatmap.words
