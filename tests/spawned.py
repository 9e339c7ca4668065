# SPDX-License-Identifier: Apache-2.0
"""Functions that run in several processes on the CPU, as one process group, and what each returned or raised there."""

from __future__ import annotations

import contextlib
import os
import pickle
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing

# Importing takes longer than what is tested: it is done once, in a process that the others are copies of. Nothing has
# been computed in it, so that no thread is lost in a copy.
_IMPORTED_ONCE = ["pytorch_lightning", "transformers", "lightning_safety.callbacks", "torch.distributed.fsdp"]

# In seconds; what a fit of a test takes on a busy machine is far less.
_LONGEST = 240


def start(run: Callable[..., None], arguments: tuple[Any, ...], *, processes: int, join: bool = True) -> Any:
    """Run ``run(rank, *arguments)`` in several processes, and return what holds them; with `join`, when all have ended.

    Raises:
        RuntimeError: With `join`: a process raised an error or died; all of their errors are in the text.
        AssertionError: With `join`: one has not ended by itself.
    """
    get_context("forkserver").set_forkserver_preload(_IMPORTED_ONCE)
    started = multiprocessing.start_processes(
        run, args=arguments, nprocs=processes, join=False, start_method="forkserver"
    )
    if join:
        _wait_for_all(started)
    return started


def _wait_for_all(started: Any) -> None:
    # Torch's own `join` ends the others as soon as one has failed: one that would wait for ever would not be seen.
    for process in started.processes:
        process.join(_LONGEST)
    hanging = [rank for rank, process in enumerate(started.processes) if process.is_alive()]
    failed = [rank for rank, process in enumerate(started.processes) if process.exitcode]
    for process in started.processes:
        process.kill()
    assert not hanging, f"processes {hanging} have not ended after {_LONGEST} s; failed are {failed}"
    if failed:
        files = [Path(started.error_files[rank]) for rank in failed]
        errors = [pickle.loads(file.read_bytes()) if file.exists() else "died" for file in files]
        raise RuntimeError("\n".join(f"process {rank}: {text}" for rank, text in zip(failed, errors, strict=True)))


def run_in_processes(folder: Path, work: Callable[[], Any], *, processes: int = 2) -> list[Any]:
    """Return what `work`, which must be picklable, returned in each process, or the text of the error it raised.

    Args:
        folder: An empty one, for this call alone.
        work: What to run.
        processes: How many.
    """
    begin_in_processes(folder, work, processes=processes, join=True)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(processes)]


def begin_in_processes(folder: Path, work: Callable[[], Any], *, processes: int = 2, join: bool = False) -> Any:
    """Let processes begin with `work`, and return what holds them; arguments as of `run_in_processes`."""
    return start(_run, (folder, work, processes), processes=processes, join=join)


def run_although_one_dies(folder: Path, work: Callable[[], Any], *, survivor: int = 0) -> Any:
    """Return what `work` returned or raised in one of two processes, of which the other may end before.

    Args:
        folder: An empty one, for this call alone.
        work: What to run.
        survivor: The number of the process to wait for, a minute at most.
    """
    started = begin_in_processes(folder, work)
    started.processes[survivor].join(60)
    for process in started.processes:
        process.kill()
    return torch.load(folder / f"{survivor}.pt", weights_only=False)


def _run(rank: int, folder: Path, work: Callable[[], Any], processes: int) -> None:
    torch.set_num_threads(1)
    # What torchrun sets, so that a Trainer in `work` takes itself for one of its processes.
    os.environ |= {
        "TORCHELASTIC_RUN_ID": "test",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "GROUP_RANK": "0",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
    }
    # One that waits for another that has gone must end, with an error.
    distributed.init_process_group(
        "gloo",
        init_method=(folder / "meeting").as_uri(),
        rank=rank,
        world_size=processes,
        timeout=timedelta(seconds=60),
    )
    try:
        found = work()
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
    torch.save(found, folder / f"{rank}.pt")
    with contextlib.suppress(Exception):
        distributed.barrier()
    distributed.destroy_process_group()
