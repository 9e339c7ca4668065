# SPDX-License-Identifier: Apache-2.0
"""Holding selected weights still, training nothing but them, and keeping the difference as a patch."""

from lightning_safety.enforcement.adapter_files import load_held_adapter, save_held_adapter
from lightning_safety.enforcement.average import AveragedWeights
from lightning_safety.enforcement.compact import CompactTraining
from lightning_safety.enforcement.entries import snapshot_entries
from lightning_safety.enforcement.held_lora import HeldLora
from lightning_safety.enforcement.hold import WeightHolder
from lightning_safety.enforcement.merge import merge_held_adapter
from lightning_safety.enforcement.patch import SafetyPatch
from lightning_safety.enforcement.perturbation import perturbed_weights
from lightning_safety.enforcement.sparse_delta import SparseDelta

__all__ = [
    "AveragedWeights",
    "CompactTraining",
    "HeldLora",
    "SafetyPatch",
    "SparseDelta",
    "WeightHolder",
    "load_held_adapter",
    "merge_held_adapter",
    "perturbed_weights",
    "save_held_adapter",
    "snapshot_entries",
]
