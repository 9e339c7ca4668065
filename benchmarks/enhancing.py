# SPDX-License-Identifier: Apache-2.0
"""What a training step takes, in time and in memory, that trains 1 % of the weights of SmolLM2-135M-Instruct (SET).

python benchmarks/enhancing.py [--json FILE] [--quick]

Float32, batches of 4 × 128 tokens, gradients clipped. AdamW and fused AdamW train all weights. "Dense masks" is what
people write themselves to train some: a boolean mask for every parameter, multiplied with its gradient, and a full copy
of the weights, from which all others are copied back. "SET" trains as many weights with an optimizer that holds nothing
else.

The optimizer's part alone is timed in more rounds: that of SET takes the selected entries out of all gradients, which
hooks do in a backward pass. Memory is the peak of a fresh process each, less the model: SmolLM2's shapes with random
weights and a random mask, once with a batch so small that gradients and optimizer are nearly all of it. "No optimizer"
is what forward and backward take by themselves: each gradient is freed as soon as it is there, and tensors that are
never scored, such as embeddings, have none (nor have they under SET).

`--quick` takes a tiny model and few rounds to show that the script works; its numbers mean nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from memory import in_fresh_process, peak, reset_peak, resident
from side_by_side import parse_arguments, print_table, print_times, summary, take_turns, write_json
from torch import Tensor
from torch.optim import Optimizer
from training_step import (
    BATCH,
    FRACTION,
    LENGTH,
    SEED,
    DenseMasks,
    TrainingStep,
    count_parameters,
    forward_and_backward,
    load_model,
    make_masks,
    make_optimizer,
    random_model,
)

from lightning_safety.enforcement import CompactTraining
from lightning_safety.enforcement.entries import gather_entries
from lightning_safety.enforcement.gradients import watch_gradient
from lightning_safety.scoring import SafetyMask, scored_weights, select_random

STEP_ROUNDS, PART_ROUNDS, MEMORY_STEPS = 15, 51, 3
SMALL_BATCH = (1, 16)
PLAIN, FUSED, DENSE, SET, SET_FUSED = (
    "AdamW",
    "fused AdamW",
    "dense masks, AdamW",
    "SET 1 %, AdamW",
    "SET 1 %, fused AdamW",
)
WAYS = (PLAIN, FUSED, DENSE, SET, SET_FUSED)
NONE = "no optimizer"


def set_up(model: Any, mask: SafetyMask, way: str, optimizer: Optimizer) -> TrainingStep:
    """Return a step of `way`. What it attaches to model and optimizer stays there."""
    if way in (SET, SET_FUSED):
        CompactTraining(mask).attach(model, [optimizer])
        return TrainingStep(model, optimizer)
    if way == DENSE:
        dense = DenseMasks(model, mask, free=True)
        optimizer.register_step_post_hook(dense.restore)
        return TrainingStep(model, optimizer, before_step=dense.mask_gradients)
    return TrainingStep(model, optimizer)


def take_entries(gradients: dict[str, Tensor], mask: SafetyMask) -> None:
    """Do what the hooks of SET do in a backward pass, which is no part of the optimizer's step: gather entries."""
    for name, indices in mask.indices.items():
        if indices.numel():
            gather_entries(gradients[name], indices)


def measure_peak(way: str, batch: int, length: int, quick: bool) -> tuple[float, float]:
    """Return the peak of a few steps, and what the model itself takes, in MB."""
    # Whatever else a first step loads into memory comes before.
    take_steps(random_model(quick=True), way, *SMALL_BATCH)
    before = resident()
    model = random_model(quick=quick)
    reset_peak()
    take_steps(model, way, batch, length)
    return peak() - before, sum(weight.nbytes for weight in model.parameters()) / 1e6


def take_steps(model: Any, way: str, batch: int, length: int) -> None:
    """Make a few."""
    scored = scored_weights(model)
    if way == NONE:
        model.requires_grad_(False)
        for weight in scored.values():
            weight.requires_grad_(True)
            watch_gradient(weight, partial(setattr, weight, "grad", None))
        step: Callable[[int, int], None] = partial(forward_and_backward, model)
    else:
        mask = select_random(scored, FRACTION, SEED)
        step = set_up(model, mask, way, make_optimizer(model, fused=way in (FUSED, SET_FUSED))).whole
    for _ in range(MEMORY_STEPS):
        step(batch, length)


def compare_times(quick: bool) -> dict[str, Any]:
    """Print both tables of times, and return their numbers."""
    step_rounds, part_rounds = (2, 3) if quick else (STEP_ROUNDS, PART_ROUNDS)
    model = load_model(quick=quick)
    mask, _ = make_masks(model, quick=quick)
    steps: dict[str, TrainingStep] = {}
    for way in (PLAIN, FUSED):
        steps[way] = set_up(model, mask, way, make_optimizer(model, fused=way == FUSED))
    # These change the optimizer, and SET the model as well.
    steps[DENSE] = set_up(model, mask, DENSE, make_optimizer(model, fused=False))
    for way in (SET, SET_FUSED):
        own = load_model(quick=quick)
        steps[way] = set_up(own, mask, way, make_optimizer(own, fused=way == SET_FUSED))
    for way in WAYS:  # The first step of an optimizer makes its state.
        steps[way].whole()
    print("A whole step:\n")
    whole = take_turns({way: steps[way].whole for way in WAYS}, rounds=step_rounds)
    print_times(whole, unit="seconds", against=FUSED)

    forward_and_backward(model)
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    for way in (SET, SET_FUSED):
        steps[way].in_backward = partial(take_entries, gradients, mask)
    print("The optimizer's part alone:\n")
    part = take_turns({way: steps[way].optimizer_part for way in WAYS}, rounds=part_rounds)
    print_times(part, unit="ms", per_second=1000, against=FUSED)
    return {
        "parameters": count_parameters(model),
        "trained": mask.count,
        "whole_step": summary(whole, against=FUSED),
        "optimizer_part": summary(part, against=FUSED),
    }


def compare_memory(quick: bool) -> dict[str, dict[str, dict[str, float]]]:
    """Print the table of memory, and return its numbers: by way and batch."""
    print("Peak above the model, in a fresh process each:\n")
    batches = {f"{batch} × {length} tokens": (batch, length) for batch, length in (SMALL_BATCH, (BATCH, LENGTH))}
    found: dict[str, dict[str, dict[str, float]]] = {}
    for way in (NONE, *WAYS):
        found[way] = {}
        for name, (batch, length) in batches.items():
            total, model = in_fresh_process(measure_peak, way, batch, length, quick)
            # float32: four bytes a parameter.
            found[way][name] = {"megabytes": total - model, "bytes_per_parameter": 4 * (total - model) / model}
    print_table(
        ["", *(f"{name}, {unit}" for name in batches for unit in ("MB", "bytes a parameter"))],
        [
            [
                way,
                *(
                    cell
                    for each in of.values()
                    for cell in (f"{each['megabytes']:.0f}", f"{each['bytes_per_parameter']:.2f}")
                ),
            ]
            for way, of in found.items()
        ],
    )
    return found


def main() -> None:
    """Print the tables."""
    arguments = parse_arguments(__doc__)
    times = compare_times(arguments.quick)
    write_json(
        arguments,
        settings={"fraction_of_scored": FRACTION, "batch": BATCH, "length": LENGTH, "dtype": str(torch.float32)},
        **times,
        peak_above_model=compare_memory(arguments.quick),
    )


if __name__ == "__main__":
    main()
