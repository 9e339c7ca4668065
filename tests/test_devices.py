# SPDX-License-Identifier: Apache-2.0
"""What is known of the memory and the devices of a machine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_safety import devices


def test_free_memory_is_what_the_system_can_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = tmp_path / "meminfo"
    said.write_text("MemTotal:  900 kB\nMemFree:   100 kB\nMemAvailable:   300 kB\n")
    monkeypatch.setattr(devices, "_MEMORY_FILE", said)
    assert devices.free_memory(torch.device("cpu")) == 300 * 1024
    monkeypatch.setattr(devices, "_MEMORY_FILE", tmp_path / "absent")
    free = devices.free_memory(torch.device("cpu"))
    assert free is None or free > 0


def test_memory_held_in_reserve_on_a_gpu_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 20)
    assert devices.free_memory(torch.device("cuda:0")) == 110


@pytest.mark.parametrize("name", ["gpu", "cuda:99"])
def test_a_device_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"`device` expected to be one that torch can use here.* got '{name}'"):
        devices.usable_device(name)
