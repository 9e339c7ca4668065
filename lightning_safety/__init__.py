# SPDX-License-Identifier: Apache-2.0
"""Keep a language model safe while you fine-tune it: a PyTorch Lightning plugin.

Names are imported on first use (PEP 562), so that ``import lightning_safety`` costs nothing and pulls in neither
Lightning nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_safety.callbacks import (
        ActivationOverlapMonitor,
        HarmfulnessMonitor,
        SafetyBudget,
        SafetyEnhancementTuning,
        SafetyPreservingAdaptation,
        SafetyRehearsal,
        SafetyReport,
        SubspaceOverlapMonitor,
        preserve_safety,
    )
    from lightning_safety.data import Example, load_prompts
    from lightning_safety.enforcement import (
        HeldLora,
        SafetyPatch,
        SparseDelta,
        load_held_adapter,
        merge_held_adapter,
        save_held_adapter,
    )
    from lightning_safety.language import (
        find_language_model,
        generate_replies,
        load_causal_lm,
        load_tokenizer,
    )
    from lightning_safety.monitoring import KeywordRefusalJudge, OwnReplies, Verdict, evaluate_safety, perplexity
    from lightning_safety.scoring import (
        GuardJudgedSafety,
        LeanScoring,
        MixtureLayout,
        RefusalLikelihood,
        RefusalMargin,
        SafetyMask,
        SafetyObjective,
        estimate_scoring_memory,
        expected_safety_impact,
        measure_router_load,
        select_bottom,
        select_neurons,
        select_random,
        select_top,
    )
    from lightning_safety.training import CausalLanguageModule, InstructionDataModule

__version__ = "0.1.0"

_ROOMS = {
    "callbacks": (
        "ActivationOverlapMonitor",
        "HarmfulnessMonitor",
        "SafetyBudget",
        "SafetyEnhancementTuning",
        "SafetyPreservingAdaptation",
        "SafetyRehearsal",
        "SafetyReport",
        "SubspaceOverlapMonitor",
        "preserve_safety",
    ),
    "data": ("Example", "load_prompts"),
    "enforcement": (
        "HeldLora",
        "SafetyPatch",
        "SparseDelta",
        "load_held_adapter",
        "merge_held_adapter",
        "save_held_adapter",
    ),
    "language": ("find_language_model", "generate_replies", "load_causal_lm", "load_tokenizer"),
    "monitoring": ("KeywordRefusalJudge", "OwnReplies", "Verdict", "evaluate_safety", "perplexity"),
    "scoring": (
        "GuardJudgedSafety",
        "LeanScoring",
        "MixtureLayout",
        "RefusalLikelihood",
        "RefusalMargin",
        "SafetyMask",
        "SafetyObjective",
        "estimate_scoring_memory",
        "expected_safety_impact",
        "measure_router_load",
        "select_bottom",
        "select_neurons",
        "select_random",
        "select_top",
    ),
    "training": ("CausalLanguageModule", "InstructionDataModule"),
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}

__all__ = ["__version__", *sorted(_ROOM_OF)]


def __getattr__(name: str) -> Any:
    """Import a public name from its room on first use."""
    if name not in _ROOM_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_ROOM_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the public names, imported or not."""
    return sorted(__all__)
