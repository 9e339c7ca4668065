# SPDX-License-Identifier: Apache-2.0
"""Peak memory, each in a fresh process: in one that has done other work, memory it has freed would be used again."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TypeVar

Result = TypeVar("Result")


def in_fresh_process(function: Callable[..., Result], *arguments: object) -> Result:
    """Return what a function of a script's top level returns in a process of its own."""
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def resident() -> float:
    """Return the memory of this process in MB, after giving back what it does not need."""
    gc.collect()
    # Memory that was freed but not given back would be used again, and a peak would seem lower.
    ctypes.CDLL(None).malloc_trim(0)
    return status("VmRSS")


def reset_peak() -> None:
    """Let the peak count from here."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def peak() -> float:
    """Return the peak of this process in MB; that of `resource` includes the parent's."""
    return status("VmHWM")


def status(key: str) -> float:
    """Return a line of this process's memory status, in MB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024 / 1e6
