# SPDX-License-Identifier: Apache-2.0
"""ActivationOverlapMonitor: what its means over layers are of where a layer has no value."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lightning_safety.callbacks import activations
from lightning_safety.monitoring import compare_activations
from tests.callbacks.fits import fit, read_lines
from tests.callbacks.test_activations import METRICS, make_monitor

pytestmark = pytest.mark.filterwarnings("ignore:.*(litlogger|not have many workers|log_every|mid-epoch)")


def test_means_are_over_the_layers_where_a_value_is_defined(tiny_tokenizer: Any, tmp_path: Path) -> None:
    """At the embeddings every prompt ends with the same token: nothing is left without the means, and no direction."""
    for layers in ([0, 1, 2], [1, 2], [0]):
        fit(tiny_tokenizer, tmp_path / str(len(layers)), [make_monitor(layers=layers)], max_steps=2)
    *_, every = read_lines(tmp_path / "3")
    *_, defined = read_lines(tmp_path / "2")
    *_, none = read_lines(tmp_path / "1")
    assert every["layers"]["0"]["overlap_centred"] is None
    for name in METRICS - {"safety/check_seconds"}:
        if "centred" in name or "cosine" in name:
            assert every[name] == defined[name], name
            assert none[name] is None, name
        else:
            attribute = name.removeprefix("safety/activation_")
            mean = sum(layer[attribute] for layer in every["layers"].values()) / 3
            assert every[name] == pytest.approx(mean), name


def test_controls_are_means_over_the_layers_of_their_value(
    tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A control may be defined where its value is not: shuffled sets of prompts of which one kind is all alike."""

    def without_one(*sets: Any, **options: Any) -> Any:
        compared = compare_activations(*sets, **options)
        return compared | {1: replace(compared[1], overlap_centred=float("nan"), overlap_centred_shuffled=9.0)}

    monkeypatch.setattr(activations, "compare_activations", without_one)
    fit(tiny_tokenizer, tmp_path, [make_monitor()], max_steps=1)
    for line in read_lines(tmp_path):
        for name in ("overlap_centred", "overlap_centred_random", "overlap_centred_shuffled"):
            assert line[f"safety/activation_{name}"] == line["layers"]["2"][name]
