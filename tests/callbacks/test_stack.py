# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import pytest

from lightning_safety.callbacks import HarmfulnessMonitor, SafetyRehearsal, preserve_safety
from lightning_safety.monitoring import OwnReplies


@pytest.mark.parametrize(("budget", "every"), [(1, 1), (0.2, 3), (0.15, 4), (0.125, 4), (0.12, "adaptive")])
def test_a_smaller_budget_rehearses_more_rarely_and_then_only_when_needed(budget: float, every: int | str) -> None:
    rehearsal, monitor = preserve_safety(budget, tokenizer="some/folder", language_model="model.student")
    assert isinstance(rehearsal, SafetyRehearsal)
    assert isinstance(monitor, HarmfulnessMonitor)
    assert rehearsal.every == every
    assert isinstance(rehearsal.rehearsal.objective, OwnReplies)
    for callback in (rehearsal, monitor):
        assert (callback.tokenizer, callback.language_model) == ("some/folder", "model.student")


@pytest.mark.parametrize(("budget", "look_every"), [(0.12, 6), (0.08, 6), (0.05, 7), (0.01, 33)])
def test_a_smaller_budget_looks_more_rarely(budget: float, look_every: int) -> None:
    rehearsal, _ = preserve_safety(budget)
    assert isinstance(rehearsal, SafetyRehearsal)
    assert rehearsal.need is not None
    assert rehearsal.need.every_n_steps == look_every


@pytest.mark.parametrize("budget", [0, 0.005, 15, True, "0.1", float("nan")])
def test_a_bad_budget_is_refused(budget: Any) -> None:
    with pytest.raises(ValueError, match=r"`budget` expected to be a share of the training time in \[0\.01, 1\]"):
        preserve_safety(budget)
