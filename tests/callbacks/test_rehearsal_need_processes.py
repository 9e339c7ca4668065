# SPDX-License-Identifier: Apache-2.0
"""Two processes look at a model, and rehearse when it needs it, as one does."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_safety.callbacks import SafetyRehearsal
from lightning_safety.monitoring import OwnReplies, own_replies
from tests.callbacks.processes import fit_alone, fit_together
from tests.callbacks.test_rehearsal_processes import KINDS, make_wide_module
from tests.callbacks.test_rehearsal_state import reply
from tests.callbacks.toys import OwnModule
from tests.tiny import make_tiny_tokenizer

# Looks come before the sixth step, which rehearses, and before the sixteenth, which need not.
STEPS = 17


def adaptive(tolerance: float) -> list[SafetyRehearsal]:
    # In a process of its own it is not undone, nor need it be.
    own_replies.generate_replies = reply  # type: ignore[assignment]
    settings: dict[str, Any] = {"watch_every_n_steps": 5, "watch_prompts": 4, "batch_size": 2, "weight": 5.0}
    objective = OwnReplies(prompts=4)
    return [
        SafetyRehearsal(
            "adaptive", objective=objective, tolerance=tolerance, tokenizer=make_tiny_tokenizer(), **settings
        )
    ]


@pytest.mark.parametrize("strategy", KINDS)
@pytest.mark.parametrize("tolerance", [0.0, 100.0], ids=["needed", "never needed"])
def test_two_processes_look_and_rehearse_as_one(
    tmp_path: Path, strategy: str, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look without a rehearsal after it must not leave whole weights behind, which no step changes (FSDP2)."""
    # Here `adaptive` must not leave its replies behind.
    monkeypatch.setattr(own_replies, "generate_replies", reply)
    (callback,) = adaptive(tolerance)
    alone = fit_alone(make_wide_module(OwnModule), [callback], steps=STEPS)
    assert callback.metrics["safety/rehearsal_share"] == pytest.approx(0 if tolerance else 1 / STEPS)
    together = fit_together(
        tmp_path, strategy, partial(make_wide_module, KINDS[strategy]), partial(adaptive, tolerance), steps=STEPS
    )
    for name, weight in alone.items():
        torch.testing.assert_close(together[name], weight, rtol=1e-5, atol=1e-6)
