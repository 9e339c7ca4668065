# SPDX-License-Identifier: Apache-2.0
"""Which weights carry safety: objectives, Expected Safety Impact, selection and masks."""

from lightning_safety.scoring.describe import GroupShare, MaskDescription, describe_mask
from lightning_safety.scoring.guard_judged import GuardJudgedSafety
from lightning_safety.scoring.impact import expected_safety_impact, mean_gradients
from lightning_safety.scoring.mask import SafetyMask
from lightning_safety.scoring.objective import (
    ObjectiveBatch,
    RefusalLikelihood,
    RefusalMargin,
    SafetyObjective,
)
from lightning_safety.scoring.selection import number_to_select, select_bottom, select_random, select_top
from lightning_safety.scoring.weights import scored_weights, weight_spread

__all__ = [
    "GroupShare",
    "GuardJudgedSafety",
    "MaskDescription",
    "ObjectiveBatch",
    "RefusalLikelihood",
    "RefusalMargin",
    "SafetyMask",
    "SafetyObjective",
    "describe_mask",
    "expected_safety_impact",
    "mean_gradients",
    "number_to_select",
    "scored_weights",
    "select_bottom",
    "select_random",
    "select_top",
    "weight_spread",
]
