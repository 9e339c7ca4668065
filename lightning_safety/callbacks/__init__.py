# SPDX-License-Identifier: Apache-2.0
"""Lightning callbacks: thin shells over the rooms, one file each."""

from __future__ import annotations

from lightning_safety.callbacks.activations import ActivationOverlapMonitor
from lightning_safety.callbacks.budget import SafetyBudget
from lightning_safety.callbacks.enhancement import SafetyEnhancementTuning
from lightning_safety.callbacks.harmfulness import HarmfulnessMonitor
from lightning_safety.callbacks.monitor import Check, SafetyListener, SafetyMonitor
from lightning_safety.callbacks.preserving import SafetyPreservingAdaptation
from lightning_safety.callbacks.rehearsal import SafetyRehearsal
from lightning_safety.callbacks.report import SafetyReport
from lightning_safety.callbacks.stack import preserve_safety
from lightning_safety.callbacks.subspace import SubspaceOverlapMonitor

__all__ = [
    "ActivationOverlapMonitor",
    "Check",
    "HarmfulnessMonitor",
    "SafetyBudget",
    "SafetyEnhancementTuning",
    "SafetyListener",
    "SafetyMonitor",
    "SafetyPreservingAdaptation",
    "SafetyRehearsal",
    "SafetyReport",
    "SubspaceOverlapMonitor",
    "preserve_safety",
]
