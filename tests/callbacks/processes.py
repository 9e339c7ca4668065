# SPDX-License-Identifier: Apache-2.0
"""Fits in two processes on the CPU, and what became of their weights."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.callbacks.toys import OwnModule, make_batches, make_loader, make_smallest_model, quiet
from tests.spawned import start

PROCESSES = 2
MakeCallbacks = Callable[[], Sequence[pl.Callback]]
MakeModule = Callable[..., OwnModule]


class Sharded(OwnModule):
    """Spreads its layers over the processes (FSDP2)."""

    def configure_model(self) -> None:
        for layer in self.model.model.layers:
            fully_shard(layer, mesh=self.device_mesh["data_parallel"])
        fully_shard(self.model, mesh=self.device_mesh["data_parallel"])


def sgd(weights: list[nn.Parameter]) -> list[torch.optim.Optimizer]:
    return [torch.optim.SGD(weights, lr=0.05, momentum=0.9, weight_decay=0.1)]


def make_uneven_model(**options: Any) -> nn.Module:
    """A model of which two processes hold unequal parts: 67 rows do not divide by two."""
    settings = {"vocab_size": 512, "max_position_embeddings": 256, "intermediate_size": 67, **options}
    return make_smallest_model(tie_word_embeddings=False, **settings)


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of the weights by name, those that processes share put together: all must call this."""
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    return {name: w.full_tensor() if isinstance(w, DTensor) else w.clone() for name, w in weights.items()}


def fit_alone(
    module: OwnModule,
    callbacks: Sequence[pl.Callback],
    *,
    steps: int,
    ckpt_path: Path | None = None,
    rows_a_step: int = PROCESSES,
    **options: Any,
) -> dict[str, Tensor]:
    """Fit in this process, on the batches of all processes at a step as one."""
    rows = make_batches(steps * rows_a_step)
    batches = [torch.cat(rows[start : start + rows_a_step]) for start in range(0, len(rows), rows_a_step)]
    pl.Trainer(**quiet(callbacks, **options)).fit(module, make_loader(batches), ckpt_path=ckpt_path)
    return {name: weight.detach() for name, weight in module.model.named_parameters()}


def fit_together(
    folder: Path, strategy: str, make_module: Callable[[], OwnModule], make_callbacks: MakeCallbacks, **options: Any
) -> dict[str, Tensor]:
    """Fit in two processes, or as many as options say, make sure that all end with the same weights, return them.

    With `rows_a_step`, so many rows at a step are shared out; else each process has one. With `saved_after`, a
    checkpoint is saved there when the fit has ended.
    """
    processes = options.pop("processes", PROCESSES)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = (processes, port, folder, strategy, make_module, make_callbacks, options)
    start(_fit_process, arguments, processes=processes)
    found = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(processes)]
    for name, weight in found[0].items():
        assert all(torch.equal(weight, other[name]) for other in found), name
    return found[0]


def _fit_process(
    rank: int,
    processes: int,
    port: int,
    folder: Path,
    strategy: str,
    make_module: Callable[[], OwnModule],
    make_callbacks: MakeCallbacks,
    options: dict[str, Any],
) -> None:
    # What torchrun sets.
    os.environ |= {
        "TORCHELASTIC_RUN_ID": "test",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "GROUP_RANK": "0",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
    }
    torch.set_num_threads(1)
    steps, resumed = options.pop("steps"), options.pop("ckpt_path", None)
    each = options.pop("rows_a_step", processes) // processes
    saved_after = options.pop("saved_after", None)
    chosen: Any = strategy
    if strategy.startswith("fsdp2"):
        sizes = {"data_parallel_size": processes, "tensor_parallel_size": 1}
        chosen = ModelParallelStrategy(**sizes, save_distributed_checkpoint=strategy != "fsdp2, one file")
    module = make_module()
    settings = quiet(make_callbacks(), **options) | {"devices": processes, "strategy": chosen}
    rows = make_batches(steps * processes * each)
    rows = [torch.cat(rows[start : start + each]) for start in range(0, len(rows), each)][rank::processes]
    # With a sanity check, FSDP2 holds some weights whole when training starts.
    validation = make_loader(rows[:1]) if settings["num_sanity_val_steps"] else None
    trainer = pl.Trainer(**settings, use_distributed_sampler=False)
    trainer.fit(module, make_loader(rows), validation, ckpt_path=resumed)
    if saved_after is not None:
        trainer.save_checkpoint(saved_after)
    torch.save(whole_weights(module.model), folder / f"{rank}.pt")
    distributed.destroy_process_group()
