# SPDX-License-Identifier: Apache-2.0
"""In which precision a fit is fast on the machine at hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch

Precision = Literal["32-true", "bf16-mixed"]
_CPU_CAPABILITIES = ("avx512_bf16", "amx_bf16")


def computes_in_bfloat16(accelerator: str = "auto") -> bool:
    """Return whether the machine multiplies bfloat16 numbers itself; elsewhere that is far slower than float32.

    Args:
        accelerator: What a trainer runs on; ``"cpu"`` for the CPU even where there is a GPU.
    """
    if accelerator != "cpu" and torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # Older torch does not tell.
    found: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(bool(found.get(name)) for name in _CPU_CAPABILITIES)


def fast_precision(accelerator: str = "auto") -> Precision:
    """Return the precision for a trainer on this machine: float32 weights, and products in bfloat16 if it has them."""
    return "bf16-mixed" if computes_in_bfloat16(accelerator) else "32-true"
