# SPDX-License-Identifier: Apache-2.0
"""A data module and a module to train a causal language model with, and the way to a Hugging Face folder."""

from __future__ import annotations

from lightning_safety.training.data_module import InstructionDataModule
from lightning_safety.training.export import export_checkpoint
from lightning_safety.training.loader import EvaluationLoader, Position, ResumableLoader
from lightning_safety.training.module import CausalLanguageModule
from lightning_safety.training.order import BatchOrder

__all__ = [
    "BatchOrder",
    "CausalLanguageModule",
    "EvaluationLoader",
    "InstructionDataModule",
    "Position",
    "ResumableLoader",
    "export_checkpoint",
]
