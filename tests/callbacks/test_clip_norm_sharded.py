# SPDX-License-Identifier: Apache-2.0
"""The norm by which gradients are clipped is that of one process where two share a model (FSDP2)."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_safety.callbacks import SafetyEnhancementTuning
from lightning_safety.callbacks.selected import SelectedWeightsCallback
from lightning_safety.processes import gather
from lightning_safety.scoring.shards import local_part
from tests.callbacks.processes import Sharded, fit_alone, fit_together, make_uneven_model, sgd
from tests.callbacks.toys import BOTH, OwnModule, mask_of_everything

STEPS = 4
CLIP = 0.1


class TellsNorms(OwnModule):
    """Writes down the norm of the gradients before and after each clipping, added up in float64."""

    def __init__(self, folder: Path) -> None:
        super().__init__(make_uneven_model(), sgd)
        self.folder = folder
        self.norms: list[tuple[float, float]] = []

    def configure_gradient_clipping(self, optimizer: Any, *options: Any, **more: Any) -> None:
        before = self._norm(optimizer)
        super().configure_gradient_clipping(optimizer, *options, **more)
        self.norms.append((before, self._norm(optimizer)))

    def on_train_end(self) -> None:
        torch.save(self.norms, self.folder / f"norms of {self.global_rank}")

    def _norm(self, optimizer: Any) -> float:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        squares = [float(local_part(gradient).double().square().sum()) for gradient in gradients]
        return math.sqrt(sum(gather(sum(squares))))


class TellsNormsSharded(TellsNorms, Sharded):
    pass


def given(kind: type[SelectedWeightsCallback]) -> list[SelectedWeightsCallback]:
    return [kind(mask=mask_of_everything(make_uneven_model()))]


@BOTH
def test_it_is_that_of_one_process(tmp_path: Path, kind: type[SelectedWeightsCallback]) -> None:
    (tmp_path / "alone").mkdir()
    options = {"steps": STEPS, "gradient_clip_val": CLIP}
    fit_alone(TellsNorms(tmp_path / "alone"), given(kind), **options)
    fit_together(tmp_path, "fsdp2", partial(TellsNormsSharded, tmp_path), partial(given, kind), **options)
    expected = torch.load(tmp_path / "alone" / "norms of 0")
    # Each step is clipped, so that a wrong norm would show in what is left.
    assert len(expected) == STEPS
    assert all(before > 1.5 * CLIP for before, _ in expected)
    for rank in range(2):
        found = torch.load(tmp_path / f"norms of {rank}")
        assert [after for _, after in found] == pytest.approx([CLIP] * STEPS, rel=2e-5)
        # Later gradients are of weights that differ by a rounding.
        assert found[0][0] == pytest.approx(expected[0][0], rel=1e-6)
        assert [before for before, _ in found] == pytest.approx([before for before, _ in expected], rel=1e-5)
    # Of a part of the weights: the norm of all is another.
    if kind is SafetyEnhancementTuning:
        (tmp_path / "plain").mkdir()
        fit_alone(TellsNorms(tmp_path / "plain"), [], **options)
        assert torch.load(tmp_path / "plain" / "norms of 0")[0][0] > 1.2 * expected[0][0]
