# SPDX-License-Identifier: Apache-2.0
"""What the package costs where it does nothing: being imported, and a fit's callbacks between scoring and the end.

python benchmarks/overhead.py --json benchmarks/results/overhead.json

`import lightning_safety` is timed in fresh interpreters, beside one that imports nothing. A fit of
SmolLM2-135M-Instruct in a Trainer, batches of 4 × 128 tokens, runs under a profiler with each callback, its mask given:
all time that is spent in functions of this package is added up, those that hold weights included, and divided by the
steps; a second table has the profile, function by function. Masks are the top 1 % by score, as a fit has them, and as
many weights at random, which lie farther apart in memory.
"""

from __future__ import annotations

import cProfile
import pstats
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from side_by_side import parse_arguments, print_table, print_times, summary, take_turns, write_json
from torch import nn
from torch.utils.data import DataLoader
from training_step import BATCH, LENGTH, SEED, load_model, make_masks

import lightning_safety
from lightning_safety import SafetyEnhancementTuning, SafetyPreservingAdaptation

PACKAGE = str(Path(lightning_safety.__file__).parent)
_SHOWN = 8
IMPORTS = {"nothing": "pass", "lightning_safety": "import lightning_safety", "torch": "import torch"}


class Module(pl.LightningModule):
    """A user's own, with fused AdamW."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:  # noqa: ARG002
        """Return the loss of predicting the batch's own tokens."""
        loss: torch.Tensor = self.model(input_ids=batch, labels=batch, use_cache=False).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return fused AdamW over all weights."""
        return torch.optim.AdamW(self.parameters(), lr=1e-6, fused=True)


class Profile(pl.Callback):
    """A profile of the batches of a fit, without what it does once."""

    def __init__(self) -> None:
        self.profile = cProfile.Profile()

    def on_train_batch_start(
        self,
        trainer: pl.Trainer,  # noqa: ARG002
        pl_module: pl.LightningModule,  # noqa: ARG002
        batch: object,  # noqa: ARG002
        batch_idx: int,
    ) -> None:
        """Begin with the first batch."""
        if batch_idx == 0:
            self.profile.enable()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """End after the last one."""
        self.profile.disable()


def profile_fit(
    model: nn.Module, callbacks: list[pl.Callback], steps: int
) -> tuple[float, float, dict[str, tuple[float, float]]]:
    """Return seconds a step of a fit, those of them in functions of this package and what these call, and the profile.

    That is, by function of the package, its calls a step and the seconds a step in it and what it calls.
    """
    torch.manual_seed(SEED)
    rows = torch.randint(100, model.config.vocab_size, (steps, BATCH, LENGTH))  # type: ignore[union-attr, arg-type]
    profile = Profile()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        callbacks=[profile, *callbacks],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(model), DataLoader(rows, batch_size=None))
    stats = pstats.Stats(profile.profile).stats  # type: ignore[attr-defined]
    whole = sum(entry[2] for entry in stats.values())
    ours = 0.0
    functions = {}
    for (file, line, name), (_, calls, _, cumulative, callers) in stats.items():
        # Called from outside the package: what it calls is counted with it.
        if file.startswith(PACKAGE):
            outside = [
                seconds for (caller, *_), (_, _, _, seconds) in callers.items() if not caller.startswith(PACKAGE)
            ]
            ours += sum(outside) if callers else cumulative
            place = f"{Path(file).relative_to(PACKAGE)}:{line} {name}"
            functions[place] = (calls / steps, cumulative / steps)
    return whole / steps, ours / steps, functions


def main() -> None:
    """Measure and print."""
    arguments = parse_arguments(__doc__)
    times = take_turns(
        {
            name: (lambda code=code: subprocess.run([sys.executable, "-c", code], check=True))
            for name, code in IMPORTS.items()
        },
        rounds=3 if arguments.quick else 15,
    )
    print_times(times, unit="ms to start Python and import", per_second=1000.0)
    model = load_model(quick=arguments.quick)
    ways: dict[str, list[pl.Callback]] = {"no callback": []}
    for kind, mask in zip(("top", "random"), make_masks(model, quick=arguments.quick), strict=True):
        ways[f"SafetyPreservingAdaptation, {kind} 1 %"] = [SafetyPreservingAdaptation(mask=mask)]
        ways[f"SafetyEnhancementTuning, {kind} 1 %"] = [SafetyEnhancementTuning(mask=mask)]
    found: dict[str, dict[str, Any]] = {}
    for name, callbacks in ways.items():
        step, ours, functions = profile_fit(model, callbacks, 3 if arguments.quick else 12)
        found[name] = {"seconds_a_step": step, "of_these_in_the_package": ours, "profile": functions}
    print_table(
        ["a fit with", "s a step", "of these in this package, ms", "share"],
        [
            [name, f"{one['seconds_a_step']:.2f}", f"{1000 * one['of_these_in_the_package']:.2f}",
             f"{100 * one['of_these_in_the_package'] / one['seconds_a_step']:.2f} %"]
            for name, one in found.items()
        ],
    )  # fmt: skip
    print_table(
        ["a fit with", "function", "calls a step", "ms a step, what it calls included"],
        [
            [name, f"`{place}`", f"{calls:.1f}", f"{1000 * seconds:.3f}"]
            for name, one in found.items()
            for place, (calls, seconds) in sorted(one["profile"].items(), key=lambda item: -item[1][1])[:_SHOWN]
        ],
    )
    write_json(arguments, settings={"batch": BATCH, "length": LENGTH}, imports=summary(times), fits=found)


if __name__ == "__main__":
    main()
