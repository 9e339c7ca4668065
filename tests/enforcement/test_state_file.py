# SPDX-License-Identifier: Apache-2.0
"""All weights of a module in a file and back; what a fit does with them is in callbacks/test_budget.py."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import nn

from lightning_safety.enforcement import state_file
from lightning_safety.enforcement.state_file import (
    fingerprint,
    load_weights,
    read_weights,
    restore_weights,
    write_weights,
)


class Quantised(nn.Module):
    """Linear layers of four and eight bits with biases, as bitsandbytes makes them, beside one of full precision."""

    def __init__(self) -> None:
        super().__init__()
        self.four = bitsandbytes.nn.Linear4bit(64, 64, quant_type="nf4")
        self.four.weight = bitsandbytes.nn.Params4bit(self.four.weight.data, requires_grad=False).to("cpu")
        self.eight = bitsandbytes.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
        self.eight.weight = bitsandbytes.nn.Int8Params(self.eight.weight.data, requires_grad=False).to("cpu")
        self.full = nn.Linear(64, 2)
        self.register_buffer("count", torch.tensor(3))


def test_quantised_weights_stay_where_they_are(tmp_path: Path) -> None:
    module = Quantised()
    weights = {name: tensor.clone() for name, tensor in read_weights(module).items()}
    assert sorted(weights) == ["count", "eight.bias", "four.bias", "full.bias", "full.weight"]
    write_weights(tmp_path / "good.safetensors", weights)
    with torch.no_grad():
        for name, tensor in read_weights(module).items():
            tensor.add_(1)
            assert not torch.equal(tensor, weights[name])
    kept = load_weights(tmp_path / "good.safetensors", fingerprint(weights))
    assert kept is not None
    restore_weights(module, kept)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in read_weights(module).items())


def test_the_fingerprint_is_of_the_contents() -> None:
    weights = {"a": torch.zeros(2, 3), "b": torch.ones(1, dtype=torch.bfloat16), "c": torch.tensor(True)}
    same = {name: weights[name].clone() for name in ("c", "a", "b")}
    same["a"] = same["a"].t().contiguous().t()
    assert fingerprint(same) == fingerprint(weights)
    others: list[dict[str, Any]] = [
        {"a": -torch.zeros(2, 3)},
        {"a": torch.zeros(3, 2)},
        {"a": torch.zeros(2, 3, dtype=torch.int32)},
        {"b": torch.ones(1, dtype=torch.float16)},
        {"c": torch.tensor(False)},
        {"d": torch.zeros(0)},
    ]
    assert len({fingerprint({**weights, **other}) for other in [{}, *others]}) == 7


def test_others_are_not_loaded(tmp_path: Path) -> None:
    path = tmp_path / "good.safetensors"
    write_weights(path, {"a": torch.zeros(2)})
    assert load_weights(path, fingerprint({"a": torch.ones(2)})) is None
    path.write_bytes(path.read_bytes()[:-1])
    assert load_weights(path, fingerprint({"a": torch.zeros(2)})) is None
    assert load_weights(tmp_path / "none", "") is None


def test_a_full_disk_leaves_the_older_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    weights = {"a": torch.zeros(2)}
    write_weights(tmp_path / "good.safetensors", weights)
    monkeypatch.setattr(state_file, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        write_weights(tmp_path / "good.safetensors", {"a": torch.ones(2)})
    assert load_weights(tmp_path / "good.safetensors", fingerprint(weights)) is not None
    assert len(list(tmp_path.iterdir())) == 1


def test_a_module_that_does_not_take_its_weights_back() -> None:
    class Stubborn(nn.Linear):
        def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
            return None

    module = Stubborn(2, 2)
    with pytest.raises(RuntimeError, match="take back its last good weights but `weight` differ"):
        restore_weights(module, {"weight": torch.zeros(2, 2), "bias": module.bias.detach().clone()})
    grown = nn.Linear(2, 2)
    weights = {name: tensor.clone() for name, tensor in read_weights(grown).items()}
    grown.register_buffer("late", torch.zeros(1))
    with pytest.raises(RuntimeError, match="but `late` differ"):
        restore_weights(grown, weights)
