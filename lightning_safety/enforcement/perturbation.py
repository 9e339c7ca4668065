# SPDX-License-Identifier: Apache-2.0
"""Noise on selected weights, for as long as a block runs: whether these weights matter more than others."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lightning_safety.enforcement.entries import gather_entries, scatter_entries, selected_parameters
from lightning_safety.scoring.mask import SafetyMask
from lightning_safety.scoring.weights import weight_spread

PAPER_NOISE = 0.38
"""Standard deviations of a weight's tensor: the noise of arXiv 2604.08297."""


def check_noise(noise: float) -> None:
    """Raise ValueError unless noise is a finite number of standard deviations, at least 0."""
    if not 0 <= noise < math.inf:
        raise ValueError(f"`noise` expected to be a number in [0, inf), in standard deviations, but got {noise}.")


@contextmanager
def perturbed_weights(
    model: nn.Module, mask: SafetyMask, *, noise: float = PAPER_NOISE, seed: int = 0
) -> Iterator[None]:
    """Add N(0, (noise · σ)²) to the selected entries, σ the standard deviation of each one's own tensor.

    Afterwards the weights are bit-identical to what they were, also where the block raised. The validation of a mask in
    "Towards Identification and Intervention of Safety-Critical Parameters in LLMs" (arXiv 2604.08297). Nothing but the
    weights in memory changes: do not save a model in the block.

    Args:
        model: A causal language model, its weights whole and in floating point.
        mask: Which entries.
        noise: In standard deviations, at least 0.
        seed: Of the noise.

    Raises:
        ValueError: `noise` is negative or not finite, or the mask does not fit the model.
    """
    check_noise(noise)
    generator = torch.Generator().manual_seed(seed)
    selected = selected_parameters(model, mask)
    before = [gather_entries(weight, indices) for _, weight, indices in selected]
    try:
        for (_, weight, indices), entries in zip(selected, before, strict=True):
            spread = weight_spread(weight).flatten().cpu()
            # Of fused experts each has its own.
            spread = spread[(indices.cpu().long() // (weight.numel() // len(spread)))]
            drawn = torch.randn(len(entries), generator=generator) * noise * spread
            scatter_entries(weight, indices, (entries.float() + drawn.to(entries.device)).to(entries.dtype))
        yield
    finally:
        for (_, weight, indices), entries in zip(selected, before, strict=True):
            scatter_entries(weight, indices, entries)
