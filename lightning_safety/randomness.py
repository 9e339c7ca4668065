# SPDX-License-Identifier: Apache-2.0
"""The state of every random number generator a fit draws from, as tensors and primitives."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def capture_random_state() -> dict[str, Any]:
    """Return the state of Python's, NumPy's and torch's generators (all CUDA devices too).

    The result holds tensors and primitives only, so that ``torch.load(weights_only=True)`` reads it back.
    """
    version, words, next_gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": {"version": version, "words": torch.tensor(words, dtype=torch.int64), "next_gauss": next_gauss},
        "numpy": {
            "kind": str(kind),
            "keys": torch.from_numpy(np.asarray(keys, dtype=np.int64).copy()),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Set every generator to a state that `capture_random_state` returned.

    CUDA states are restored for the devices both machines have.
    """
    python, numpy_ = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["next_gauss"]))
    np.random.set_state(
        (
            numpy_["kind"],
            numpy_["keys"].numpy().astype(np.uint32),
            numpy_["position"],
            numpy_["has_gauss"],
            numpy_["cached"],
        )
    )
    torch.set_rng_state(state["torch"].cpu())
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for device, cuda_state in enumerate(state["cuda"][:devices]):
        torch.cuda.set_rng_state(cuda_state.cpu(), device)


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Leave every generator as it was found, whatever is drawn inside."""
    state = capture_random_state()
    try:
        yield
    finally:
        restore_random_state(state)
