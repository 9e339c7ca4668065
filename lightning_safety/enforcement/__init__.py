# SPDX-License-Identifier: Apache-2.0
"""Holding selected weights still, training nothing but them, and keeping the difference as a patch."""

from lightning_safety.enforcement.average import AveragedWeights
from lightning_safety.enforcement.compact import CompactTraining
from lightning_safety.enforcement.entries import snapshot_entries
from lightning_safety.enforcement.hold import WeightHolder
from lightning_safety.enforcement.patch import SafetyPatch

__all__ = ["AveragedWeights", "CompactTraining", "SafetyPatch", "WeightHolder", "snapshot_entries"]
