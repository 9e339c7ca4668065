# SPDX-License-Identifier: Apache-2.0
"""Memory that comparing three checkpoints from files takes at its peak, against the size of the largest tensor.

python benchmarks/streaming_memory.py

The checkpoints are SmolLM2-135M's shapes with random weights, 538 MB each, in a temporary folder.
"""

from __future__ import annotations

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


def write(folder: Path, seed: int) -> Path:
    """Write a checkpoint of random weights."""
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir()
    weights = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    save_file(weights, folder / "model.safetensors")
    return folder


def status(key: str) -> float:
    """Return a line of this process's memory status, in MB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1000


def main() -> None:
    """Write, compare, and print the peak."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = [write(Path(folder) / name, seed) for seed, name in enumerate(("base", "aligned", "finetuned"))]
        torch.linalg.eigh(torch.eye(4, dtype=torch.float64))  # loads what it needs
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak counts from here
        before = status("VmRSS")
        compare_checkpoints(*checkpoints, show_progress=False)
        peak = status("VmHWM") - before
    largest = max(rows * columns for rows, columns in SHAPES.values()) * 4 / 1e6
    print(f"peak {peak:.0f} MB, largest tensor {largest:.0f} MB, ratio {peak / largest:.2f}")


if __name__ == "__main__":
    main()
