# SPDX-License-Identifier: Apache-2.0
"""Memory that comparing three checkpoints from files takes at its peak, against the size of the largest tensor.

python benchmarks/streaming_memory.py

The checkpoints are SmolLM2-135M's shapes with random weights in a temporary folder, 538 MB each in float32 and half of
that in bfloat16. What is held does not depend on the type, so that the second ratio is up to twice the first.
"""

from __future__ import annotations

import multiprocessing
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from lightning_safety.monitoring import compare_checkpoints

HIDDEN, KEYS, INNER, VOCABULARY, LAYERS = 576, 192, 1536, 49152, 30
SHAPES = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
for layer in range(LAYERS):
    for name, shape in {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (KEYS, HIDDEN),
        "self_attn.v_proj": (KEYS, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (INNER, HIDDEN),
        "mlp.up_proj": (INNER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INNER),
    }.items():
        SHAPES[f"model.layers.{layer}.{name}.weight"] = shape


def write(folder: Path, seed: int, dtype: torch.dtype) -> Path:
    """Write a checkpoint of random weights."""
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir()
    weights = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
    save_file(weights, folder / "model.safetensors")
    return folder


def status(key: str) -> float:
    """Return a line of this process's memory status, in MB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1000


def measure(checkpoints: list[Path], dtype: torch.dtype) -> None:
    """Compare, and print the peak."""
    torch.linalg.eigh(torch.eye(4, dtype=torch.float64))  # loads what it needs
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak counts from here
    before = status("VmRSS")
    compare_checkpoints(*checkpoints, show_progress=False)
    peak = status("VmHWM") - before
    largest = max(rows * columns for rows, columns in SHAPES.values()) * dtype.itemsize / 1e6
    print(f"{dtype}: peak {peak:.0f} MB, largest tensor {largest:.0f} MB, ratio {peak / largest:.2f}", flush=True)


def main() -> None:
    """Write checkpoints of both types, and compare them in a process of its own."""
    for dtype in (torch.float32, torch.bfloat16):
        with tempfile.TemporaryDirectory() as folder:
            names = ("base", "aligned", "finetuned")
            checkpoints = [write(Path(folder) / name, seed, dtype) for seed, name in enumerate(names)]
            # What writing them has allocated and freed would be used again, and the peak would seem lower.
            process = multiprocessing.get_context("spawn").Process(target=measure, args=(checkpoints, dtype))
            process.start()
            process.join()
            if process.exitcode:
                raise SystemExit(process.exitcode)


if __name__ == "__main__":
    main()
