# SPDX-License-Identifier: Apache-2.0
"""What holding 1 % of the weights adds to a training step of SmolLM2-135M-Instruct (SPA).

python benchmarks/holding.py [--json FILE] [--quick]

Full fine-tuning in float32, batches of 4 × 128 tokens, gradients clipped. All ways train one model with one of two
optimizers, so that nothing but what they add differs. "Random weights" is the control of the same size: spread evenly
over all layers. "Dense masks" is what people write themselves: a boolean mask for every tensor, multiplied with its
gradient, and a full copy of the weights, from which the held ones are copied back.

A whole step varies by more than holding adds to it. So the optimizer's part is timed alone in many rounds, and so are
masking and restoring: gradients masked as in a fit (by hooks in the backward pass, and before the step where something
has changed them since; dense masks: once), and values restored after it.

`--quick` takes a tiny model and few rounds to show that the script works; its numbers mean nothing.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from side_by_side import parse_arguments, print_table, print_times, summary, take_turns, write_json
from torch.utils.hooks import RemovableHandle
from training_step import (
    BATCH,
    FRACTION,
    LENGTH,
    DenseMasks,
    TrainingStep,
    count_parameters,
    load_model,
    make_masks,
    make_optimizer,
)

from lightning_safety.enforcement import WeightHolder
from lightning_safety.scoring import SafetyMask

STEP_ROUNDS, PART_ROUNDS = 21, 101
PLAIN, FUSED = "AdamW", "fused AdamW"
SPA, RANDOM = "SPA 1 %, fused AdamW", "random weights, fused AdamW"
DENSE, DENSE_FUSED = "dense masks, AdamW", "dense masks, fused AdamW"
WAYS = (PLAIN, FUSED, SPA, RANDOM, DENSE, DENSE_FUSED)


class Trainings:
    """One model, and all ways to train it: one at a time is in place."""

    def __init__(self, model: Any, top: SafetyMask, random: SafetyMask) -> None:
        self.model = model
        plain, fused = (make_optimizer(model, fused=fused) for fused in (False, True))
        self.holders = {SPA: WeightHolder(top), RANDOM: WeightHolder(random)}
        self.dense = DenseMasks(model, top, free=False)
        self.steps = {PLAIN: TrainingStep(model, plain), FUSED: TrainingStep(model, fused)}
        for way, holder in self.holders.items():
            again = partial(holder.mask_gradients, only_changed=True)
            self.steps[way] = TrainingStep(model, fused, in_backward=holder.mask_gradients, before_step=again)
        for way, optimizer in ((DENSE, plain), (DENSE_FUSED, fused)):
            self.steps[way] = TrainingStep(model, optimizer, before_step=self.dense.mask_gradients)
        self._attached: WeightHolder | None = None
        self._handle: RemovableHandle | None = None

    def put_in_place(self, way: str) -> None:
        """Hold as `way` does from here on, and no longer as the one before.

        Raises:
            RuntimeError: The one before let a weight move.
        """
        if self._attached is not None:
            if self._attached.verify():
                raise RuntimeError("A held weight has moved.")
            self._attached.release()
        if self._handle is not None:
            self._handle.remove()
        self._attached = self._handle = None
        optimizer = self.steps[way].optimizer
        if way in self.holders:
            self._attached = self.holders[way].attach(self.model, [optimizer])
        elif way in (DENSE, DENSE_FUSED):
            self._handle = optimizer.register_step_post_hook(self.dense.restore)

    def masking_and_restoring(self) -> dict[str, Callable[[], None]]:
        """Return what the ways add to a step, alone; to be called while they are in place."""

        def held(holder: WeightHolder) -> Callable[[], None]:
            def run() -> None:
                holder.mask_gradients()
                holder.mask_gradients(only_changed=True)
                holder.restore()

            return run

        def dense() -> None:
            self.dense.mask_gradients()
            self.dense.restore()

        return {**{way: held(holder) for way, holder in self.holders.items()}, DENSE: dense}


def main() -> None:
    """Print the tables."""
    arguments = parse_arguments(__doc__)
    step_rounds, part_rounds = (2, 3) if arguments.quick else (STEP_ROUNDS, PART_ROUNDS)
    model = load_model(quick=arguments.quick)
    top, random = make_masks(model, quick=arguments.quick)
    trainings = Trainings(model, top, random)
    for way in WAYS:  # The first step of an optimizer makes its state.
        trainings.put_in_place(way)
        trainings.steps[way].whole()

    print("A whole step:\n")
    wholes = {way: trainings.steps[way].whole for way in WAYS}
    whole = take_turns(wholes, rounds=step_rounds, prepare=trainings.put_in_place)
    print_times(whole, unit="seconds", against=FUSED)

    print("The optimizer's part alone, with masking and restoring:\n")
    parts = {way: trainings.steps[way].optimizer_part for way in WAYS}
    part = take_turns(parts, rounds=part_rounds, prepare=trainings.put_in_place)
    print_times(part, unit="ms", per_second=1000, against=FUSED)

    print("Masking and restoring alone:\n")
    added = take_turns(trainings.masking_and_restoring(), rounds=part_rounds, prepare=trainings.put_in_place)
    print_times(added, unit="ms", per_second=1000)

    step = statistics.median(whole[FUSED])
    shares = {way: statistics.median(seconds) / step for way, seconds in added.items()}
    print(f"Of a step with fused AdamW ({step:.2f} s, median):\n")
    print_table(
        ["", "masking and restoring", "memory, MB"],
        [[way, f"{share:.2%}", f"{held_bytes(trainings, way) / 1e6:.1f}"] for way, share in shares.items()],
    )
    write_json(
        arguments,
        settings={
            "parameters": count_parameters(model),
            "held": top.count,
            "fraction_of_scored": FRACTION,
            "batch": BATCH,
            "length": LENGTH,
            "dtype": str(torch.float32),
        },
        whole_step=summary(whole, against=FUSED),
        optimizer_part=summary(part, against=FUSED),
        masking_and_restoring=summary(added),
        share_of_step=shares,
        bytes_held={way: held_bytes(trainings, way) for way in shares},
    )


def held_bytes(trainings: Trainings, way: str) -> int:
    """Return the memory of masks and saved values."""
    trainings.put_in_place(way)
    return trainings.holders[way].bytes if way in trainings.holders else trainings.dense.bytes


if __name__ == "__main__":
    main()
