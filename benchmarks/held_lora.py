# SPDX-License-Identifier: Apache-2.0
"""What holding 1 % of the base weights costs under LoRA on SmolLM2-135M-Instruct, per step and in memory.

python benchmarks/held_lora.py

LoRA of rank 16 on all linear layers, AdamW, float32, batches of 4 × 128 tokens. Steps of all ways take turns in one
process; memory is the peak of a fresh process each, less what it has before the model is there. Where the adapters drop
inputs, the product cannot be taken out within that of the base.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import peft
import torch
from side_by_side import compare

from lightning_safety.enforcement import HeldLora, WeightHolder
from lightning_safety.enforcement.adapters import adapter_rows
from lightning_safety.language import BUNDLED_MODEL, find_language_model, load_causal_lm, load_tokenizer
from lightning_safety.scoring import (
    RefusalMargin,
    SafetyMask,
    expected_safety_impact,
    select_neurons,
    select_random,
    select_top,
)

FRACTION = 0.01
ROUNDS = 9
BATCH, LENGTH = 4, 128
DROPOUT = 0.05
PLAIN = "plain LoRA"
HELD = ("single weights", "random weights", "whole neurons")
WAYS = (PLAIN, *HELD, f"{PLAIN}, dropout", f"{HELD[0]}, dropout")


class Training:
    """A model with adapters, and one step of its training."""

    def __init__(self, way: str) -> None:
        torch.manual_seed(0)
        self.way, _, drops = way.partition(", ")
        config = peft.LoraConfig(
            r=16,
            lora_alpha=32,
            lora_dropout=DROPOUT if drops else 0.0,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        self.model = peft.get_peft_model(load_causal_lm(BUNDLED_MODEL, dtype="float32"), config).train()
        trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5)
        self.tokens = torch.randint(100, 49000, (BATCH, LENGTH))

    def step(self) -> None:
        """Make one."""
        self.optimizer.zero_grad()
        self.model(input_ids=self.tokens, labels=self.tokens, use_cache=False).loss.backward()
        self.optimizer.step()

    def hold(self, masks: Path) -> None:
        """Hold from here on, as `SafetyPreservingAdaptation` does; nothing where the way is plain."""
        if self.way == PLAIN:
            return
        mask = SafetyMask.load(masks / self.way)
        model = find_language_model(self.model)
        WeightHolder(mask).attach(model, [self.optimizer])
        if self.way == "whole neurons":
            WeightHolder(adapter_rows(model, mask)).attach(model, [self.optimizer])
        else:
            HeldLora(mask).attach(model)


def make_masks(model: Any) -> dict[str, SafetyMask]:
    """Score the model as a fit does."""
    scores = expected_safety_impact(model, RefusalMargin(), load_tokenizer(BUNDLED_MODEL))
    masks = (select_top(scores, FRACTION), select_random(scores, FRACTION, 0), select_neurons(scores, FRACTION))
    return dict(zip(HELD, masks, strict=True))


def main() -> None:
    """Print both tables."""
    trainings = {way: Training(way) for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        for name, mask in make_masks(find_language_model(trainings[PLAIN].model)).items():
            mask.save(Path(folder) / name)
        for training in trainings.values():
            training.hold(Path(folder))
            training.step()
        compare({way: training.step for way, training in trainings.items()}, rounds=ROUNDS, unit="seconds")
        print("\n| | peak of a fresh process, MiB |\n|---|---|")
        for way in trainings:
            command = [sys.executable, __file__, way, folder]
            print(f"| {way} | {subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()} |")


def measure_memory(way: str, masks: str) -> None:
    """Print how much three steps add to the memory of this process, model included."""
    before = _peak()
    training = Training(way)
    training.hold(Path(masks))
    for _ in range(3):
        training.step()
    print(f"{(_peak() - before) / 1024:.0f}")


def _peak() -> int:
    """Return the peak of this process in KiB; that of `resource` includes the parent's."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))


if __name__ == "__main__":
    measure_memory(*sys.argv[1:]) if sys.argv[1:] else main()
