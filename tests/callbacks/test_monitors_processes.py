# SPDX-License-Identifier: Apache-2.0
"""Monitors under DDP: two processes see what one sees, one of them writes, none trains otherwise or waits for ever."""

from __future__ import annotations

import csv
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger

from lightning_safety.processes import rank
from tests.callbacks import subspaces
from tests.callbacks.fits import read_lines
from tests.callbacks.shared_fits import (
    HARMFUL,
    BrokenInOne,
    PoisonInOne,
    activations,
    files_in,
    fit,
    harmfulness,
    metrics_of,
    monitors,
    validate,
)
from tests.spawned import run_in_processes

pytestmark = pytest.mark.filterwarnings("ignore:.*(not have many workers|log_every|says little|not empty)")

STEPS = [0, 2, 4]


def _watched(folder: Path) -> dict[str, Any]:
    """A watched fit, with loggers and checkpoints; and one resumed from its middle."""
    saver = ModelCheckpoint(
        folder / "saved",
        "{step}",
        monitor="safety/attack_success_rate",
        mode="min",
        save_top_k=-1,
        every_n_train_steps=2,
    )
    trainer, weights = fit(folder / "fit", [*monitors(), saver], logger=CSVLogger(folder / "fit", name="csv"))
    found = {
        "metrics": metrics_of(trainer),
        "own": {type(one).__name__: one.metrics for one in trainer.callbacks[:3]},  # type: ignore[attr-defined]
        "weights": weights,
        "best": (Path(saver.best_model_path).name, float(saver.best_model_score or 0)),
    }
    resumed, found["resumed weights"] = fit(
        folder / "resumed", monitors(), steps=6, ckpt_path=folder / "saved" / "step=2.ckpt"
    )
    found |= {"resumed metrics": metrics_of(resumed)}
    return {**found, "validated": metrics_of(validate(folder / "validate", [harmfulness()]))}


def _outcome(folder: Path, *callbacks: pl.Callback, **options: Any) -> Any:
    try:
        return metrics_of(fit(folder, callbacks, **options)[0])
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _work(folder: Path) -> dict[str, Any]:
    found = _watched(folder)
    bare = {"steps": 3, "dropout": 0.3}
    looking = [harmfulness(every_n_steps=1), activations(every_n_steps=1), subspaces.make_monitor(every_n_steps=1)]
    return {
        **found,
        "with monitors": fit(folder / "with", looking, **bare)[1],
        "without": fit(folder / "without", [], **bare)[1],
        "quick": _outcome(folder / "quick", *monitors(), fast_dev_run=True),
        "broken judge": _outcome(folder / "judge", harmfulness(judges=BrokenInOne())),
        "poisoned": _outcome(folder / "poisoned", PoisonInOne(), activations()),
        "other prompts": _outcome(folder / "prompts", harmfulness(harmful=HARMFUL[rank() :])),
        "no room": _outcome(folder / "room" if rank() else Path("/proc/none"), harmfulness()),
        "after all this": _outcome(folder / "after", harmfulness()),
    }


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return tmp_path_factory.mktemp("alone"), tmp_path_factory.mktemp("together")


@pytest.fixture(scope="module")
def alone(folders: tuple[Path, Path]) -> dict[str, Any]:
    return _watched(folders[0])


@pytest.fixture(scope="module")
def both(folders: tuple[Path, Path]) -> list[dict[str, Any]]:
    results = run_in_processes(folders[1], partial(_work, folders[1]))
    for found in results:
        assert isinstance(found, dict), found
    return results


def _compare(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Rates and what counts them exactly, what is computed in floating point up to rounding."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if "seconds" in name or name == "run":
            continue
        if "_rate" in name or not isinstance(value, float | dict):
            assert found[name] == value or (found[name] != found[name] and value != value), name
        elif isinstance(value, dict):
            _compare(found[name], value)
        else:
            assert found[name] == pytest.approx(value, rel=1e-4, abs=1e-5, nan_ok=True), name


@pytest.mark.parametrize("name", ["metrics", "resumed metrics", "validated"])
def test_callback_metrics_are_those_of_one_process_and_alike(
    alone: dict[str, Any], both: list[dict[str, Any]], name: str
) -> None:
    first, second = both
    assert str(first[name]) == str(second[name])
    _compare(first[name], alone[name])
    assert first["own"].keys() == alone["own"].keys()
    assert str(first["own"]) == str(second["own"])
    assert "safety/attack_success_rate" in first[name]
    if name != "validated":
        assert {"safety/subspace_overlap", "safety/activation_overlap"} < set(first[name])


def test_checkpoints_are_chosen_alike(alone: dict[str, Any], both: list[dict[str, Any]]) -> None:
    assert both[0]["best"] == both[1]["best"] == alone["best"]


def test_lines_and_replies_are_those_of_one_process(
    alone: dict[str, Any], both: list[dict[str, Any]], folders: tuple[Path, Path]
) -> None:
    one, two = (folder / "fit" / "csv" / "version_0" for folder in folders)
    assert files_in(folders[0] / "fit") == files_in(folders[1] / "fit")
    for name in ("safety.jsonl", "safety_replies.jsonl"):
        expected, found = list(read_lines(one, name)), list(read_lines(two, name))
        assert len(found) == len(expected)
        for line, other in zip(found, expected, strict=True):
            _compare(line, other)
    assert len(list(read_lines(two, "safety_replies.jsonl"))) == 1 + 9 * len(STEPS)
    with (two / "metrics.csv").open() as file:
        rows = [row["step"] for row in csv.DictReader(file) if row["safety/attack_success_rate"]]
    assert rows == [str(step) for step in STEPS]


def test_a_resumed_fit_opens_the_file_of_start_weights(both: list[dict[str, Any]], folders: tuple[Path, Path]) -> None:
    lines = [line for line in read_lines(folders[1] / "resumed") if line["monitor"] == "SubspaceOverlapMonitor"]
    assert [line["step"] for line in lines] == [4, 6]
    assert not (folders[1] / "resumed" / "safety_subspaces.safetensors").exists()
    whole = [line for line in read_lines(folders[1] / "fit" / "csv" / "version_0") if line["step"] == 4]
    assert len(whole) == 3
    assert both[0]["resumed metrics"]["safety/update_norm"] > both[0]["metrics"]["safety/update_norm"] > 0


def test_monitors_leave_training_as_it_is(alone: dict[str, Any], both: list[dict[str, Any]]) -> None:
    for name, expected in alone["weights"].items():
        for found in both:
            torch.testing.assert_close(found["weights"][name], expected, rtol=1e-5, atol=1e-6)
            assert torch.equal(found["weights"][name], both[0]["weights"][name])
            assert torch.equal(found["with monitors"][name], found["without"][name]), name


def test_an_error_in_one_process_ends_every_one(both: list[dict[str, Any]]) -> None:
    first, second = both
    assert second["broken judge"].startswith("TypeError: `score` of the judge 'by_text' expected to return a list")
    message = "OtherProcessError: The check of HarmfulnessMonitor failed in process 1 of 2: TypeError: `score` of"
    assert first["broken judge"].startswith(message)
    assert second["poisoned"].startswith("ValueError: `model` expected to give finite activations but layer 1 gives")
    message = "OtherProcessError: The check of ActivationOverlapMonitor failed in process 1 of 2: ValueError: `model`"
    assert first["poisoned"].startswith(message)
    # Rank zero writes alone.
    assert first["no room"].startswith("FileNotFoundError")
    message = "OtherProcessError: The check of HarmfulnessMonitor failed in process 0 of 2: FileNotFoundError"
    assert second["no room"].startswith(message)


def test_processes_with_different_prompts_are_refused(both: list[dict[str, Any]]) -> None:
    for found in both:
        assert found["other prompts"] == (
            "ValueError: `harmful` expected to be the same in all 2 processes but process 1 has another than process 0."
            " Give every process the same prompts: copy the file to each machine."
        )


def test_a_fast_dev_run_leaves_no_file(both: list[dict[str, Any]], folders: tuple[Path, Path]) -> None:
    assert "safety/subspace_overlap" in both[1]["quick"]
    assert files_in(folders[1] / "quick") == []


def test_processes_work_on_after_errors(both: list[dict[str, Any]]) -> None:
    assert "safety/attack_success_rate" in both[0]["after all this"]
    assert str(both[0]["after all this"]) == str(both[1]["after all this"])


def test_sharded_models_are_refused_where_weights_are_compared() -> None:
    strategy = pl.strategies.ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    trainer = pl.Trainer(strategy=strategy, devices=2, accelerator="cpu", logger=False)
    monitor = subspaces.make_monitor()
    message = rf"got ModelParallelStrategy with 2 process.*{type(monitor).__name__}.*or one of DDPStrategy"
    with pytest.raises(ValueError, match=message):
        monitor.setup(trainer, pl.LightningModule(), "fit")
