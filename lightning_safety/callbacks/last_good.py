# SPDX-License-Identifier: Apache-2.0
"""The weights of the last check that found nothing wrong: kept in one file, put back bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from torch import Tensor, nn

from lightning_safety.callbacks.log import leaves_files, run_folder
from lightning_safety.enforcement.state_file import (
    fingerprint,
    load_weights,
    read_weights,
    restore_weights,
    write_weights,
)
from lightning_safety.processes import from_first, rank, together, world_size

LAST_GOOD_FILE = "safety_last_good.safetensors"
"""The last good weights, in the run folder."""

CHECKPOINT_GOOD_FILE = "safety_last_good_of_checkpoint.safetensors"
"""Those that the last checkpoint names, once a later check has taken their place."""


@dataclass(frozen=True)
class GoodWeights:
    """Which weights are good, and where they are.

    Attributes:
        step: The optimizer step of the check.
        sha256: The SHA-256 over names, dtypes, shapes and bytes of all tensors, in hexadecimal digits.
        path: Their file. None: in memory.
    """

    step: int
    sha256: str
    path: str | None


class LastGoodWeights:
    """Keeps the weights of the last good check of a fit.

    They are one file in the run folder. Where the last checkpoint names weights that a later check replaces, these stay
    beside it in a second file, so that a fit that is killed and resumed has them.

    Attributes:
        good: What is kept; None before the first check.
    """

    def __init__(self) -> None:
        self.good: GoodWeights | None = None
        self._named: GoodWeights | None = None
        self._memory: dict[str, Tensor] = {}

    def keep(self, trainer: pl.Trainer, module: nn.Module) -> None:
        """Keep the present weights in place of the earlier ones; on every process, of which the first writes.

        Raises:
            OSError: The file cannot be written.
        """
        with together("Keeping the last good weights"):
            if not leaves_files(trainer):
                weights = read_weights(module)
                self._memory = {name: tensor.cpu().clone() for name, tensor in weights.items()}
                self.good = GoodWeights(trainer.global_step, fingerprint(self._memory), None)
                return
            if rank() == 0 and self.good is not None and self.good == self._named:
                path = Path(self.good.path or "")
                if path == _file(trainer) and path.is_file():
                    path.replace(path.with_name(CHECKPOINT_GOOD_FILE))
            self._write(trainer, module, trainer.global_step)

    def _write(self, trainer: pl.Trainer, module: nn.Module, step: int) -> None:
        good = None
        if rank() == 0:
            # The first process alone knows the run folder: loggers of the others may name another.
            path = _file(trainer)
            weights = {name: tensor.cpu() for name, tensor in read_weights(module).items()}
            write_weights(path, weights)
            good = GoodWeights(step, fingerprint(weights), str(path))
        self.good = from_first(good)

    def restore(self, module: nn.Module) -> GoodWeights:
        """Put the weights back, bit for bit, and return which they are; on every process.

        Raises:
            ValueError: The file is gone or holds others.
            RuntimeError: The module does not take them back.
        """
        if self.good is None:
            raise ValueError("There are no last good weights to restore: none were kept.")
        with together("Restoring the last good weights"):
            restore_weights(module, self._memory if self.good.path is None else _load(self.good, self.good.path))
        return self.good

    def state_dict(self) -> dict[str, Any] | None:
        """Return step, fingerprint and path, for a checkpoint: it names these weights from now on."""
        self._named = self.good
        return None if self.good is None else asdict(self.good)

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Take up what a checkpoint names; `find` says whether it is still there."""
        self.good = self._named = None if state is None else GoodWeights(**state)

    def find(self, trainer: pl.Trainer, module: nn.Module) -> None:
        """Find the weights that a checkpoint names, for a fit that is resumed with the checkpoint's own weights.

        On every process, of which the first looks.

        Raises:
            ValueError: The checkpoint names none, or they are gone.
        """
        with together("Finding the last good weights"):
            self._find(trainer, module)

    def _find(self, trainer: pl.Trainer, module: nn.Module) -> None:
        if self.good is None:
            raise ValueError(
                '`action="rollback"` expected a checkpoint that names its last good weights but it names none: it was'
                " saved with another action. Pass that action, or start a new fit from its weights."
            )
        if self.good.path is None:
            return
        old = Path(self.good.path)
        if path := from_first(_search(trainer, self.good) if rank() == 0 else None):
            self.good = self._named = replace(self.good, path=path)
            return
        # A checkpoint saved right after the check holds them itself.
        if fingerprint(read_weights(module)) != self.good.sha256:
            raise ValueError(
                f"`{old}` expected to hold the last good weights of the checkpoint, of step {self.good.step}, but"
                f" {_what_is_there(old)}. They are kept for the last checkpoint only. Resume from that one, pass"
                " another `action`, or start a new fit from the checkpoint's weights."
            )
        self._write(trainer, module, self.good.step)
        self._named = self.good


def _load(good: GoodWeights, path: str) -> dict[str, Tensor]:
    weights = load_weights(Path(path), good.sha256)
    if weights is None:
        shared = ", and the run folder where every process sees it" if world_size() > 1 else ""
        raise ValueError(
            f"`{path}` expected to hold the last good weights, of step {good.step}, but {_what_is_there(Path(path))}."
            f" Nothing was restored. Leave the file alone during a fit{shared}."
        )
    return weights


def _search(trainer: pl.Trainer, good: GoodWeights) -> str | None:
    """Return the path under which good weights are now, if they are: the run folder may have moved."""
    for main in (Path(good.path or ""), _file(trainer)):
        for path in (main, main.with_name(CHECKPOINT_GOOD_FILE)):
            if load_weights(path, good.sha256) is not None:
                return str(path)
    return None


def _what_is_there(path: Path) -> str:
    return "it holds others or was damaged" if path.is_file() else "there is none"


def _file(trainer: pl.Trainer) -> Path:
    return (run_folder(trainer) / LAST_GOOD_FILE).absolute()
