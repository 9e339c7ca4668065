# SPDX-License-Identifier: Apache-2.0
"""A fit that goes on, from a checkpoint or with the same trainer, compares with its first start or stops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint

from tests.callbacks.fits import fit, make_loader, read_lines
from tests.callbacks.subspaces import Weights, make_monitor

pytestmark = pytest.mark.filterwarnings("ignore:.*(litlogger|not have many workers|log_every|not empty|mid-epoch)")


def test_a_resumed_fit_compares_with_the_first_start(tiny_tokenizer: Any, tmp_path: Path) -> None:
    saver = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    first, second = Weights(), Weights()
    fit(tiny_tokenizer, tmp_path / "run", [make_monitor(), saver, first], max_epochs=1)
    subspaces = (tmp_path / "run" / "safety_subspaces.safetensors").read_bytes()
    checkpoint = tmp_path / "step=6.ckpt"
    fit(tiny_tokenizer, tmp_path / "run", [make_monitor(), second], max_epochs=2, ckpt_path=checkpoint)
    assert (tmp_path / "run" / "safety_subspaces.safetensors").read_bytes() == subspaces
    lines = list(read_lines(tmp_path / "run"))
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10, 12]
    assert len({line["run"] for line in lines}) == 1
    for line in lines:
        now = (first.seen if line["step"] <= 6 else second.seen)[line["step"]]
        moved = torch.cat([(weight - first.seen[0][name]).flatten() for name, weight in now.items()])
        assert line["safety/update_norm"] == pytest.approx(float(moved.double().norm()), rel=1e-6)


def test_a_resumed_fit_without_its_file_stops(tiny_tokenizer: Any, tmp_path: Path) -> None:
    saver = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=2)
    fit(tiny_tokenizer, tmp_path, [make_monitor(), saver], max_steps=2)
    checkpoint = tmp_path / "step=2.ckpt"

    def resume(*callbacks: pl.Callback) -> None:
        fit(tiny_tokenizer, tmp_path, callbacks, max_steps=4, ckpt_path=checkpoint)

    file = tmp_path / "safety_subspaces.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match="expected to be the file of this run but it has changed"):
        resume(make_monitor())
    file.unlink()
    with pytest.raises(ValueError, match=r"start weights expected to be in .*safety_subspaces.* Put it back"):
        resume(make_monitor())
    file.write_bytes(whole)
    resume(make_monitor())
    fit(tiny_tokenizer, tmp_path / "without", [ModelCheckpoint(dirpath=tmp_path, filename="plain")], max_steps=2)
    checkpoint = tmp_path / "plain.ckpt"
    with pytest.raises(ValueError, match="names no file of start weights"):
        resume(make_monitor())


def test_a_trainer_that_goes_on_keeps_its_start(tiny_tokenizer: Any, tmp_path: Path) -> None:
    weights = Weights()
    trainer, module = fit(tiny_tokenizer, tmp_path, [weights, make_monitor()], max_epochs=1)
    start = dict(weights.seen[0])
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, make_loader())
    for line in read_lines(tmp_path):
        moved = [weight - start[name] for name, weight in weights.seen[line["step"]].items()]
        norm = float(torch.cat([one.flatten() for one in moved]).double().norm())
        assert line["safety/update_norm"] == pytest.approx(norm, rel=1e-6)
    assert line["step"] == 12


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({}, {"energy": 0.1}, r"`energy` expected to be that of the subspaces .* 0.8, but got 0.1"),
        ({"watch_utility": False}, {}, "expected to hold the utility subspaces of every weight .* has none of"),
        ({"include": "*mlp*"}, {}, "expected to hold the safety subspaces of every weight .* has none of"),
    ],
)
def test_a_resumed_fit_of_other_arguments_stops(
    tiny_tokenizer: Any, tmp_path: Path, first: dict[str, Any], second: dict[str, Any], message: str
) -> None:
    saver = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=2)
    fit(tiny_tokenizer, tmp_path, [make_monitor(**first), saver], max_steps=2)
    with pytest.raises(ValueError, match=message):
        fit(tiny_tokenizer, tmp_path, [make_monitor(**second)], max_steps=4, ckpt_path=tmp_path / "step=2.ckpt")


def test_a_run_folder_that_has_moved_is_found(tiny_tokenizer: Any, tmp_path: Path) -> None:
    saver = ModelCheckpoint(dirpath=tmp_path / "old", filename="{step}", every_n_train_steps=2)
    fit(tiny_tokenizer, tmp_path / "old", [make_monitor(), saver], max_steps=2)
    (tmp_path / "old").rename(tmp_path / "new")
    fit(tiny_tokenizer, tmp_path / "new", [make_monitor()], max_steps=4, ckpt_path=tmp_path / "new" / "step=2.ckpt")
    assert [line["step"] for line in read_lines(tmp_path / "new")] == [2, 4]
