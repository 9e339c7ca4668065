# SPDX-License-Identifier: Apache-2.0
"""Lightning callbacks: thin shells over the rooms, one file each."""

from __future__ import annotations

from lightning_safety.callbacks.enhancement import SafetyEnhancementTuning
from lightning_safety.callbacks.harmfulness import HarmfulnessMonitor
from lightning_safety.callbacks.preserving import SafetyPreservingAdaptation

__all__ = ["HarmfulnessMonitor", "SafetyEnhancementTuning", "SafetyPreservingAdaptation"]
