# SPDX-License-Identifier: Apache-2.0
"""ActivationOverlapMonitor: what it logs and draws, what its start is, and that training goes on as without it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import jsonargparse
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint

from lightning_safety.callbacks import ActivationOverlapMonitor
from lightning_safety.data import Example
from lightning_safety.monitoring import last_token_activations, refusal_direction_cosine
from tests.callbacks.fits import UserModule, fit, make_loader, make_trainer, read_lines, read_steps

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(litlogger|not have many workers|log_every|not empty|mid-epoch|callbacks used)"
)

HARMFUL = [Example(f"Do a bad thing, number {index}.") for index in range(6)]
HARMLESS = [Example(f"What comes after the number {index}?") for index in range(5)]
LAYERS = [1, 2]
METRICS = {
    "safety/activation_overlap",
    "safety/activation_overlap_random",
    "safety/activation_overlap_shuffled",
    "safety/activation_overlap_centred",
    "safety/activation_overlap_centred_random",
    "safety/activation_overlap_centred_shuffled",
    "safety/activation_separability",
    "safety/activation_separability_chance",
    "safety/refusal_direction_cosine",
    "safety/check_seconds",
}


def make_monitor(**options: Any) -> ActivationOverlapMonitor:
    settings = {"harmful": HARMFUL, "harmless": HARMLESS, "layers": LAYERS, "figures": False}
    return ActivationOverlapMonitor(**{**settings, **options})


def measure_directions(module: torch.nn.Module, tokenizer: Any) -> dict[int, torch.Tensor]:
    harmful, harmless = (
        last_token_activations(module, tokenizer, [example.prompt for example in examples], layers=LAYERS)
        for examples in (HARMFUL, HARMLESS)
    )
    return {layer: harmful[layer].mean(dim=0) - harmless[layer].mean(dim=0) for layer in LAYERS}


def test_each_check_is_logged_with_its_random_values_and_by_layer(tiny_tokenizer: Any, tmp_path: Path) -> None:
    trainer, _ = fit(tiny_tokenizer, tmp_path, [make_monitor(every_n_steps=2)], max_steps=3)
    lines = list(read_lines(tmp_path))
    assert [line["step"] for line in lines] == [0, 2, 3]
    for line in lines:
        assert {name for name in line if "/" in name} == METRICS
        assert line["prompts"] == {"harmful": 6, "harmless": 5}
        assert set(line["layers"]) == {"1", "2"}
        for name in ("overlap", "overlap_random", "overlap_centred", "overlap_centred_random", "separability"):
            mean = sum(layer[name] for layer in line["layers"].values()) / 2
            assert line[f"safety/activation_{name}"] == pytest.approx(mean), name
        assert line["safety/activation_separability_chance"] == pytest.approx(6 / 11)
        for layer in line["layers"].values():
            assert layer["overlap_centred_random"] == max(layer["ranks_centred"]) / 32
    cosines = [line["safety/refusal_direction_cosine"] for line in lines]
    assert cosines[0] == pytest.approx(1)
    assert cosines[2] < cosines[1] < 0.999
    assert set(trainer.callback_metrics) >= METRICS


def test_the_direction_stays_where_nothing_is_learned(tiny_tokenizer: Any, tmp_path: Path) -> None:
    class Frozen(UserModule):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    trainer = make_trainer(tmp_path, [make_monitor(every_n_steps=1)], max_steps=2)
    trainer.fit(Frozen(tiny_tokenizer), make_loader())
    assert [line["safety/refusal_direction_cosine"] for line in read_lines(tmp_path)] == pytest.approx([1] * 3)


def test_without_a_check_at_the_start_the_direction_is_still_taken_there(tiny_tokenizer: Any, tmp_path: Path) -> None:
    for at_start in (True, False):
        fit(tiny_tokenizer, tmp_path / str(at_start), [make_monitor(every_n_steps=2, at_start=at_start)], max_steps=4)
    first, *rest = read_lines(tmp_path / "True")
    assert first["step"] == 0
    later = list(read_lines(tmp_path / "False"))
    name = "safety/refusal_direction_cosine"
    assert [(line["step"], line[name]) for line in later] == [(line["step"], line[name]) for line in rest]


def test_a_resumed_fit_keeps_the_start_and_another_fit_has_its_own(tiny_tokenizer: Any, tmp_path: Path) -> None:
    def cosines(folder: str) -> list[float]:
        return [line["safety/refusal_direction_cosine"] for line in read_lines(tmp_path / folder)]

    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=4, save_top_k=-1)
    monitor, resumed = make_monitor(every_n_steps=2), make_monitor(every_n_steps=2)
    fit(tiny_tokenizer, tmp_path / "whole", [monitor, saver], max_steps=6)
    start = measure_directions(UserModule(tiny_tokenizer), tiny_tokenizer)
    checkpoint = tmp_path / "step=4.ckpt"
    _, module = fit(tiny_tokenizer, tmp_path / "resumed", [resumed], max_steps=6, ckpt_path=checkpoint)
    assert read_steps(tmp_path / "resumed") == [6]
    assert cosines("resumed")[0] < 0.99
    expected = refusal_direction_cosine(start, measure_directions(module, tiny_tokenizer))
    assert cosines("resumed") == pytest.approx([expected], abs=1e-5)

    fit(tiny_tokenizer, tmp_path / "again", [monitor], max_steps=6)
    assert cosines("again") == cosines("whole")
    other = make_monitor(every_n_steps=2, layers=[1])
    with pytest.raises(ValueError, match="`start` and `now` expected to be of the same layers"):
        fit(tiny_tokenizer, tmp_path / "other", [other], max_steps=6, ckpt_path=checkpoint)


@pytest.mark.parametrize("at_start", [True, False])
def test_weights_are_the_same_bits_with_the_monitor_and_without(
    tiny_tokenizer: Any, tmp_path: Path, at_start: bool
) -> None:
    monitor = make_monitor(every_n_steps=1, at_start=at_start, figures=True)
    _, watched = fit(tiny_tokenizer, tmp_path, [monitor], max_epochs=1)
    _, alone = fit(tiny_tokenizer, tmp_path, [], max_epochs=1)
    assert read_steps(tmp_path) == list(range(0 if at_start else 1, 7))
    assert [part.training for part in watched.modules()] == [part.training for part in alone.modules()]
    for (name, one), (_, other) in zip(watched.named_parameters(), alone.named_parameters(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_works_in_validate_and_test_beside_the_start_of_a_fit_if_there_was_one(
    tiny_tokenizer: Any, tmp_path: Path, stage: str
) -> None:
    trainer = make_trainer(tmp_path, [make_monitor()], max_steps=2, limit_val_batches=1, limit_test_batches=1)
    module = UserModule(tiny_tokenizer)
    for _ in range(2):
        getattr(trainer, stage)(module, make_loader(), verbose=False)
    trainer.fit(module, make_loader())
    getattr(trainer, stage)(module, make_loader(), verbose=False)
    before, again, start, end, after = read_lines(tmp_path)
    assert {name for name in before if "/" in name} == METRICS - {"safety/refusal_direction_cosine"}
    assert again["layers"] == before["layers"]
    assert start["safety/refusal_direction_cosine"] == pytest.approx(1)
    assert after["safety/refusal_direction_cosine"] == end["safety/refusal_direction_cosine"] < 0.999


def test_takes_the_monitor_split_layers_by_range_and_draws(tiny_tokenizer: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    monitor = ActivationOverlapMonitor(None, at_end=False)
    fit(tiny_tokenizer, tmp_path, [monitor], max_steps=1)
    [line] = read_lines(tmp_path)
    assert line["prompts"] == {"harmful": 40, "harmless": 40}
    # Of three hidden states, ⌊0.65 · 3⌋ … ⌊0.90 · 3⌋ − 1.
    assert set(line["layers"]) == {"1"}
    picture = (tmp_path / "safety_figures" / "activation_overlap-0.png").read_bytes()
    assert picture.startswith(b"\x89PNG")


def test_a_check_is_of_the_weights_as_they_are(tiny_tokenizer: Any, tmp_path: Path) -> None:
    _, module = fit(tiny_tokenizer, tmp_path, [make_monitor()], max_steps=2)
    *_, line = read_lines(tmp_path)
    for layer, direction in measure_directions(module, tiny_tokenizer).items():
        assert line["layers"][str(layer)]["direction_norm"] == pytest.approx(float(direction.norm()), rel=1e-4)


def test_fast_dev_run_uses_two_prompts_and_leaves_no_file(tiny_tokenizer: Any, tmp_path: Path) -> None:
    trainer, _ = fit(tiny_tokenizer, tmp_path, [make_monitor(figures=True)], fast_dev_run=True, logger=True)
    assert set(trainer.callback_metrics) >= METRICS
    assert list(tmp_path.iterdir()) == []


def test_matplotlib_is_missed_before_anything_is_trained(
    tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "matplotlib" else find(name))
    with pytest.raises(
        ModuleNotFoundError, match=r"pip install 'lightning-safety\[report\]'`, or pass `figures=False`"
    ):
        fit(tiny_tokenizer, tmp_path, [make_monitor(figures=True)], max_steps=1)
    fit(tiny_tokenizer, tmp_path, [make_monitor()], max_steps=1)


def test_every_argument_can_be_said_in_yaml(tmp_path: Path) -> None:
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--callback", type=pl.Callback)
    text = """
callback:
  class_path: lightning_safety.ActivationOverlapMonitor
  init_args:
    every_n_steps: null
    every_n_epochs: 2
    at_start: false
    at_end: false
    harmful: {source: behaviours.csv, prompt_column: goal}
    harmless: harmless
    split: score
    prompts: null
    layers: LAYERS
    energy: 0.5
    batch_size: 4
    allow_test: true
    tokenizer: some/folder
    language_model: network
    figures: false
"""
    for layers in ([20, 24], [3], (0.5, 0.75)):
        arguments = parser.parse_string(text.replace("LAYERS", str(list(layers))))
        monitor = parser.instantiate_classes(arguments).callback
        assert isinstance(monitor, ActivationOverlapMonitor)
        assert monitor.layers == layers
        # As LightningCLI saves it beside the run.
        dumped = parser.dump(arguments, skip_none=False)
        assert parser.dump(parser.parse_string(dumped), skip_none=False) == dumped
        assert "Unable" not in dumped


def test_bad_arguments_are_named() -> None:
    bad: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"split": "test"}, ValueError, "`split` expected to be for use during training but got 'test'"),
        ({"harmless": {"source": "harmless", "split": "test"}}, ValueError, "kept for evaluation"),
        ({"prompts": 1}, ValueError, "`prompts` expected to be at least 2 but got 1"),
        ({"prompts": 0}, ValueError, "`prompts` expected to be at least 1 but got 0"),
        ({"batch_size": 0}, ValueError, "`batch_size` expected to be at least 1 but got 0"),
        ({"energy": 0.0}, ValueError, "`energy` expected to be in"),
        ({"layers": (0.9, 0.65)}, ValueError, "the lower first"),
        ({"layers": [-1]}, ValueError, "numbers from 0"),
        ({"layers": []}, TypeError, "`layers` expected to be two shares"),
    ]
    for options, error, message in bad:
        with pytest.raises(error, match=message):
            ActivationOverlapMonitor(**options)
    ActivationOverlapMonitor(split="test", allow_test=True)


def test_what_is_missing_stops_the_fit_before_it_trains(tiny_tokenizer: Any, tmp_path: Path) -> None:
    module = UserModule(tiny_tokenizer)
    start = module.network.lm_head.weight.clone()
    for options, message in (
        ({"harmful": []}, "`harmful` expected to hold at least one prompt but it is empty"),
        ({"harmless": HARMLESS[:1]}, "`harmless` expected to hold at least 2 prompts but got 1"),
        ({"language_model": "netwrk"}, "Did you mean `network`"),
        ({"layers": [3]}, "numbers in 0 … 2 but got 3"),
    ):
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path, [make_monitor(at_start=False, **options)], max_steps=1).fit(module, make_loader())
    assert torch.equal(module.network.lm_head.weight, start)


@pytest.mark.parametrize("at_start", [True, False])
def test_a_fit_resumed_without_the_start_has_no_cosine(tiny_tokenizer: Any, tmp_path: Path, at_start: bool) -> None:
    """The weights are trained by then: a cosine with their directions would say that nothing has turned."""

    def saver(folder: Path) -> ModelCheckpoint:
        return ModelCheckpoint(folder, "{step}", every_n_train_steps=2, save_top_k=-1)

    fit(tiny_tokenizer, tmp_path, [saver(tmp_path)], max_steps=2)
    checkpoint = tmp_path / "step=2.ckpt"
    # The second time the checkpoint has a state of the monitor, which knows no start either.
    for folder, steps in ((tmp_path / "once", 4), (tmp_path / "twice", 6)):
        monitor = make_monitor(every_n_steps=2, at_start=at_start)
        callbacks = [monitor, saver(folder)]
        with pytest.warns(UserWarning, match="leaves `safety/refusal_direction_cosine` out of this fit") as record:
            trainer, _ = fit(tiny_tokenizer, folder, callbacks, max_steps=steps, ckpt_path=checkpoint)
        assert len([one for one in record if "refusal_direction_cosine" in str(one.message)]) == 1
        assert read_steps(folder)[-1] == steps
        for line in read_lines(folder):
            assert {name for name in line if "/" in name} & METRICS == METRICS - {"safety/refusal_direction_cosine"}
            assert all("refusal_direction_cosine" not in layer for layer in line["layers"].values())
        assert "safety/refusal_direction_cosine" not in trainer.callback_metrics
        checkpoint = folder / "step=4.ckpt"
