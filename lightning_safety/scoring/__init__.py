# SPDX-License-Identifier: Apache-2.0
"""Which weights carry safety: objectives, Expected Safety Impact, selection and masks."""

from lightning_safety.scoring.describe import MaskDescription, describe_mask
from lightning_safety.scoring.expert_shares import ExpertShare
from lightning_safety.scoring.guard_judged import GuardJudgedSafety
from lightning_safety.scoring.impact import expected_safety_impact, mean_gradients
from lightning_safety.scoring.lean import LeanScoring
from lightning_safety.scoring.mask import SafetyMask
from lightning_safety.scoring.memory import ScoringMemory, estimate_scoring_memory
from lightning_safety.scoring.mixture import MixtureLayout
from lightning_safety.scoring.neurons import select_neurons
from lightning_safety.scoring.objective import (
    ObjectiveBatch,
    RefusalLikelihood,
    RefusalMargin,
    SafetyObjective,
)
from lightning_safety.scoring.router_load import RouterLoad, measure_router_load
from lightning_safety.scoring.selection import number_to_select, select_bottom, select_random, select_top
from lightning_safety.scoring.shares import GroupShare
from lightning_safety.scoring.weights import scored_weights, weight_spread

__all__ = [
    "ExpertShare",
    "GroupShare",
    "GuardJudgedSafety",
    "LeanScoring",
    "MaskDescription",
    "MixtureLayout",
    "ObjectiveBatch",
    "RefusalLikelihood",
    "RefusalMargin",
    "RouterLoad",
    "SafetyMask",
    "SafetyObjective",
    "ScoringMemory",
    "describe_mask",
    "estimate_scoring_memory",
    "expected_safety_impact",
    "mean_gradients",
    "measure_router_load",
    "number_to_select",
    "scored_weights",
    "select_bottom",
    "select_neurons",
    "select_random",
    "select_top",
    "weight_spread",
]
