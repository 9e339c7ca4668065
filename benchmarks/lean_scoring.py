# SPDX-License-Identifier: Apache-2.0
"""What scoring SmolLM2-135M-Instruct takes, and what each way of taking less costs.

OMP_NUM_THREADS=1 python benchmarks/lean_scoring.py time | masks | memory

``time``: against plain forward and backward passes over the same tokens, without padding, one row at a time and packed
into rows as long as a batch of eight prompts. All take turns in one process; seconds are those of the processor, which
other programs disturb less. ``masks``: Jaccard of each way's mask with that of the default. ``memory``: the peak of a
fresh process each, less what it holds before scoring, beside the estimate.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_safety.language import BUNDLED_MODEL, load_causal_lm, load_tokenizer
from lightning_safety.scoring import (
    RefusalMargin,
    SafetyMask,
    estimate_scoring_memory,
    expected_safety_impact,
    select_random,
    select_top,
)

PROMPTS = 16
ROUNDS = 5
MASK_PROMPTS = 60
PLAIN = "plain, a row at a time"
SCORING: dict[str, dict[str, Any]] = {
    "batch_size=1": {"batch_size": 1},
    "batch_size=4": {"batch_size": 4},
    "batch_size=8": {"batch_size": 8},
    "passes=4": {"passes": 4},
    "accumulate_dtype=bfloat16": {"accumulate_dtype": "bfloat16"},
    "autocast=bfloat16": {"autocast": "bfloat16"},
}
MASKS: dict[str, dict[str, Any]] = {
    "passes=4": {"passes": 4},
    "batch_size=1": {"batch_size": 1},
    "accumulate_dtype=bfloat16": {"accumulate_dtype": "bfloat16"},
    "accumulate_dtype=bfloat16, batch_size=1": {"accumulate_dtype": "bfloat16", "batch_size": 1},
    "autocast=bfloat16": {"autocast": "bfloat16"},
    "both": {"accumulate_dtype": "bfloat16", "autocast": "bfloat16"},
}
MEMORY: tuple[dict[str, Any], ...] = (
    {"batch_size": 1},
    {"batch_size": 8},
    {"passes": 4},
    {"accumulate_dtype": "bfloat16"},
    {"autocast": "bfloat16"},
    {"dtype": "bfloat16"},
    {"dtype": "bfloat16", "batch_size": 1},
)
FRACTIONS = (0.001, 0.01, 0.1)


def time_scoring() -> None:
    """Print the times of all ways."""
    model, tokenizer = load_causal_lm(BUNDLED_MODEL, dtype="float32"), load_tokenizer(BUNDLED_MODEL)
    objective = RefusalMargin(limit=PROMPTS)
    rows: list[Tensor] = []
    for batch in objective.batches(tokenizer, batch_size=1):
        for ids, mask in zip(batch.tensors["input_ids"], batch.tensors["attention_mask"], strict=True):
            rows.append(ids[mask.bool()][None])
    whole = torch.cat(rows, dim=1)
    packed = list(torch.chunk(whole, 2, dim=1))

    def plain(inputs: list[Tensor]) -> None:
        model.zero_grad()
        for ids in inputs:
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    def score(options: dict[str, Any]) -> None:
        model.zero_grad()
        expected_safety_impact(model, objective, tokenizer, show_progress=False, **options)

    ways: dict[str, Callable[[], None]] = {PLAIN: lambda: plain(rows), "plain, packed": lambda: plain(packed)}
    ways |= {name: lambda options=options: score(options) for name, options in SCORING.items()}  # type: ignore[misc]
    times: dict[str, list[float]] = {name: [] for name in ways}
    score({"batch_size": 1, "include": "*.0.self_attn.q_proj*"})
    for _ in range(ROUNDS):
        for name, run in ways.items():
            start = time.process_time()
            run()
            times[name].append(time.process_time() - start)
    print(f"{PROMPTS} prompts, {sum(row.numel() for row in rows):,} tokens in {len(rows)} rows, {ROUNDS} rounds\n")
    print("| | seconds, median | lowest | highest | of plain | of packed |\n|---|---|---|---|---|---|")
    for name, found in times.items():
        ratios = [
            statistics.median(one / other for one, other in zip(found, times[base], strict=True))
            for base in list(ways)[:2]
        ]
        print(f"| {name} | {statistics.median(found):.2f} | {min(found):.2f} | {max(found):.2f} |", end="")
        print("".join(f" {ratio:.2f} |" for ratio in ratios))


def compare_masks() -> None:
    """Print how far the masks of all ways agree with that of the default, beside a random mask."""
    model, tokenizer = load_causal_lm(BUNDLED_MODEL, dtype="float32"), load_tokenizer(BUNDLED_MODEL)
    print("| | " + " | ".join(f"top {fraction:.1%}" for fraction in FRACTIONS) + " |\n|---|" + "---|" * len(FRACTIONS))
    scores = score_for_mask(model, tokenizer, {})
    expected = [select_top(scores, fraction) for fraction in FRACTIONS]
    print_agreement("random", [select_random(scores, fraction, seed=0) for fraction in FRACTIONS], expected)
    for name, options in MASKS.items():
        found = score_for_mask(model, tokenizer, options)
        print_agreement(name, [select_top(found, fraction) for fraction in FRACTIONS], expected)


def print_agreement(name: str, masks: list[SafetyMask], expected: list[SafetyMask]) -> None:
    """Print a row with the Jaccard index of each mask and the one expected."""
    values = [one.overlap(other) / (one | other).count for one, other in zip(masks, expected, strict=True)]
    print(f"| {name} | " + " | ".join(f"{value:.4f}" for value in values) + " |", flush=True)


def score_for_mask(model: Any, tokenizer: Any, options: dict[str, Any]) -> dict[str, Tensor]:
    """Score by all prompts of the split, or `MASK_PROMPTS` of them."""
    return expected_safety_impact(model, RefusalMargin(limit=MASK_PROMPTS), tokenizer, show_progress=False, **options)


def compare_memory() -> None:
    """Print peaks beside estimates."""
    print("| | peak, MB | with every block given back, MB | estimate, MB |\n|---|---|---|---|")
    for options in MEMORY:
        command = [sys.executable, __file__, "peak", json.dumps(options)]
        peaks = []
        # glibc keeps freed blocks below a threshold that grows as it runs; set, it stays.
        for environment in ({}, {"MALLOC_MMAP_THRESHOLD_": "65536"}):
            shown = subprocess.run(
                command, check=True, capture_output=True, text=True, env={**os.environ, **environment}
            )
            peak, estimate = shown.stdout.split()
            peaks.append(peak)
        name = ", ".join(f"{key}={value}" for key, value in options.items())
        print(f"| {name} | {' | '.join(peaks)} | {estimate} |", flush=True)


def measure_peak(options: dict[str, Any]) -> None:
    """Print by how much scoring raises the memory of this process, and the estimate, in MB."""
    model = load_causal_lm(BUNDLED_MODEL, dtype=options.pop("dtype", "float32"))
    tokenizer, objective = load_tokenizer(BUNDLED_MODEL), RefusalMargin(limit=PROMPTS)
    estimate = estimate_scoring_memory(model, objective, tokenizer, **options).on_device
    # What is imported or set up at the first use is no part of it.
    expected_safety_impact(model, RefusalMargin(limit=1), tokenizer, show_progress=False, include="*.0.mlp.up*")
    # Forget the peak of loading.
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _status("VmRSS")
    expected_safety_impact(model, objective, tokenizer, show_progress=False, **options)
    print(f"{(_status('VmHWM') - before) / 1e6:.0f} {estimate / 1e6:.0f}")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(key)))


if __name__ == "__main__":
    what = sys.argv[1] if len(sys.argv) > 1 else ""
    if what == "peak":
        measure_peak(json.loads(sys.argv[2]))
    else:
        {"time": time_scoring, "masks": compare_masks, "memory": compare_memory}[what]()
