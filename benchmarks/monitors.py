# SPDX-License-Identifier: Apache-2.0
"""What the monitors cost at their default settings on SmolLM2-135M-Instruct, as a share of training time.

python benchmarks/monitors.py

Full fine-tuning in float32, batches of 4 × 128 tokens. A check is timed by the monitor itself (`safety/check_seconds`);
its share is that of a fit that checks at the default period.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from lightning_safety import (
    ActivationOverlapMonitor,
    CausalLanguageModule,
    HarmfulnessMonitor,
    SubspaceOverlapMonitor,
)
from lightning_safety.language import BUNDLED_MODEL

STEPS = 12
BATCH, LENGTH = 4, 128


class StepTimes(pl.Callback):
    """Seconds from the start of a batch to its end, without what callbacks do after it."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        """Start the clock."""
        self._start = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        """Stop it."""
        self.seconds.append(time.perf_counter() - self._start)


def main() -> None:
    """Train a few steps with a check every third, and print what a check costs beside what the steps do."""
    module = CausalLanguageModule(BUNDLED_MODEL, dtype="float32", learning_rate=1e-5)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(100, 49000, (STEPS * BATCH, LENGTH), generator=generator)
    data = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in rows]
    monitors = [HarmfulnessMonitor, SubspaceOverlapMonitor, ActivationOverlapMonitor]
    times = StepTimes()
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_steps=STEPS,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            default_root_dir=folder,
            callbacks=[times, *(monitor(every_n_steps=STEPS // 4, at_start=False) for monitor in monitors)],
        )
        trainer.fit(module, DataLoader(data, batch_size=BATCH))  # type: ignore[arg-type]
        lines = [json.loads(line) for line in (Path(folder) / "safety.jsonl").read_text(encoding="utf-8").splitlines()]
    step = statistics.median(times.seconds[1:])
    print(f"a step: {step:.2f} s, median of {len(times.seconds) - 1}; {torch.get_num_threads()} threads\n")
    print(
        "| | seconds a check, median | lowest | highest | default period | share of training time |\n"
        + "|---" * 6
        + "|"
    )
    total = 0.0
    for monitor in monitors:
        seconds = [line["safety/check_seconds"] for line in lines if line["monitor"] == monitor.__name__]
        period = monitor().every_n_steps
        share = statistics.median(seconds) / (period * step)
        total += share
        spread = f"{statistics.median(seconds):.1f} | {min(seconds):.1f} | {max(seconds):.1f}"
        print(f"| {monitor.__name__} | {spread} | {period} | {100 * share:.1f} % |")
    print(f"| all three | | | | | {100 * total:.1f} % |")


if __name__ == "__main__":
    main()
