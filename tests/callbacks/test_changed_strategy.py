# SPDX-License-Identifier: Apache-2.0
"""A checkpoint of one strategy that is resumed under another: what is held stays held, or an error says what to do."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from pytorch_lightning.callbacks import ModelCheckpoint

from lightning_safety.callbacks import SafetyEnhancementTuning, SafetyPreservingAdaptation
from lightning_safety.callbacks.selected import SelectedWeightsCallback
from tests.callbacks.processes import Sharded, fit_alone, fit_together, make_uneven_model, sgd
from tests.callbacks.toys import BOTH, OwnModule, assert_acted, mask_of_everything, weights_of

STEPS = 2


def make_module(strategy: str) -> OwnModule:
    return (Sharded if strategy.startswith("fsdp2") else OwnModule)(make_uneven_model(), sgd)


def given(kind: type[SelectedWeightsCallback], folder: Path | None) -> list[Any]:
    callback = kind(mask=mask_of_everything(make_uneven_model()))
    saver = ModelCheckpoint(dirpath=folder, filename="{epoch}", save_top_k=-1)
    return [callback] if folder is None else [callback, saver]


def fit(folder: Path, strategy: str, kind: type[SelectedWeightsCallback], **options: Any) -> dict[str, Any]:
    callbacks = partial(given, kind, None if "ckpt_path" in options else folder)
    if strategy == "auto":
        return fit_alone(make_module(strategy), callbacks(), steps=STEPS, **options)
    return fit_together(folder, strategy, partial(make_module, strategy), callbacks, steps=STEPS, **options)


def resumed(tmp_path: Path, before: str, after: str, kind: type[SelectedWeightsCallback]) -> dict[str, Any]:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    fit(first, before, kind)
    return fit(second, after, kind, ckpt_path=first / "epoch=0.ckpt", max_epochs=2)


WHOLE, SHARDED = ("auto", "ddp"), ("fsdp2, one file", "fsdp2")
CHANGED = [("auto", "ddp"), ("ddp", "auto"), ("auto", "fsdp2"), ("ddp", "fsdp2"), *((SHARDED[0], one) for one in WHOLE)]


@BOTH
@pytest.mark.parametrize(("before", "after"), CHANGED)
def test_it_acts_on_the_same_weights_or_refuses(
    tmp_path: Path, before: str, after: str, kind: type[SelectedWeightsCallback]
) -> None:
    if kind is SafetyEnhancementTuning and (before in SHARDED) != (after in SHARDED):
        # The optimizers' states are elsewhere.
        with pytest.raises((ValueError, RuntimeError), match=r"`ckpt_path` expected to have the optimizers' states as"):
            resumed(tmp_path, before, after, kind)
        return
    ended = resumed(tmp_path, before, after, kind)
    model = make_uneven_model()
    start = weights_of(model)
    model.load_state_dict(ended, strict=False)
    assert_acted(kind, model, start, mask_of_everything(make_uneven_model()))


@pytest.mark.parametrize("after", WHOLE)
def test_a_folder_of_parts_is_refused_by_lightning_where_the_model_is_whole(tmp_path: Path, after: str) -> None:
    with pytest.raises((IsADirectoryError, RuntimeError), match="Is a directory"):
        resumed(tmp_path, "fsdp2", after, SafetyPreservingAdaptation)
