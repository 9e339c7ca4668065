# SPDX-License-Identifier: Apache-2.0
"""Devices: whether they are there, how much memory is free on them, what they are called, and sizes in words."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

_MEMORY_FILE = Path("/proc/meminfo")
_PROCESSOR_FILE = Path("/proc/cpuinfo")


def free_memory(device: torch.device) -> int | None:
    """Return how many bytes can still be had on a device, or None where it does not say.

    Args:
        device: On a GPU of CUDA, what torch holds in reserve counts as free. On the CPU under Linux, so does what the
            system would give back (``MemAvailable``). Limits of a container are not known here.

    Example:
        >>> free_memory(torch.device("meta"))
    """
    if device.type == "cuda":
        reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + reserve
    if device.type != "cpu":
        return None
    if _MEMORY_FILE.exists():
        for line in _MEMORY_FILE.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not there on Windows and macOS
        return None


def usable_device(name: str) -> torch.device:
    """Return the device of this name.

    Raises:
        ValueError: There is none.

    Example:
        >>> usable_device("cpu")
        device(type='cpu')
    """
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    # torch built without CUDA fails by an assertion.
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"`device` expected to be one that torch can use here, for instance 'cpu' or 'cuda', but got {name!r}:"
            f" {str(error).splitlines()[0]}"
        ) from error
    return device


def in_gigabytes(size: int) -> str:
    """Return bytes as gigabytes of 10⁹.

    Example:
        >>> in_gigabytes(1_230_000_000)
        '1.23 GB'
    """
    return f"{size / 1e9:.2f} GB"


def processor_name() -> str:
    """Return what the processor calls itself, under Linux; else its architecture."""
    lines = _PROCESSOR_FILE.read_text(encoding="utf-8").splitlines() if _PROCESSOR_FILE.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
