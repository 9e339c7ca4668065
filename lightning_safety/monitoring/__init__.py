# SPDX-License-Identifier: Apache-2.0
"""Judges of replies, rates with intervals, perplexity, and an evaluation that puts them side by side."""

from __future__ import annotations

from lightning_safety.monitoring.activation_comparison import (
    LayerComparison,
    compare_activations,
    direction_cosines,
    refusal_direction_cosine,
)
from lightning_safety.monitoring.activation_figure import draw_activation_overlap
from lightning_safety.monitoring.activations import Activations, check_layers, last_token_activations
from lightning_safety.monitoring.agreement import (
    Agreement,
    LabelledReply,
    agreement,
    agreement_table,
    read_labelled_replies,
)
from lightning_safety.monitoring.drift import DriftRow, DriftSummary, compare_checkpoints, summarise_drift
from lightning_safety.monitoring.evaluation import CONTENT_WARNING, SafetyEvaluation, evaluate_safety
from lightning_safety.monitoring.exact_match import exact_match
from lightning_safety.monitoring.harmfulness import Harmfulness, JudgedReply, measure_harmfulness
from lightning_safety.monitoring.judges import (
    ClassifierJudge,
    FunctionJudge,
    GuardModelJudge,
    Judge,
    JudgeFunction,
    KeywordRefusalJudge,
    RefusalClassifier,
    RubricJudge,
    Verdict,
    as_judge,
    judge_replies,
)
from lightning_safety.monitoring.margin import refusal_margin
from lightning_safety.monitoring.metrics import (
    AttackSuccessRate,
    OverRefusalRate,
    RefusalRate,
    SafetyRate,
    UnscoredRate,
)
from lightning_safety.monitoring.own_replies import OwnReplies
from lightning_safety.monitoring.paired import (
    OutcomeChange,
    compare_outcomes,
    paired_increase_p_value,
    smallest_detectable_increase,
)
from lightning_safety.monitoring.perplexity import Perplexity, perplexity
from lightning_safety.monitoring.projection import Projection, project_checkpoint, project_weights
from lightning_safety.monitoring.rates import (
    Rate,
    attack_success_rate,
    over_refusal_rate,
    refusal_rate,
    unscored_rate,
)
from lightning_safety.monitoring.repeated import RepeatedComparison
from lightning_safety.monitoring.separability import Separability, linear_separability
from lightning_safety.monitoring.sets import PromptSource, read_prompts
from lightning_safety.monitoring.subspace import (
    LeftBasis,
    energy_kept_ratio,
    left_basis,
    project_update,
    random_basis,
    random_directions,
    random_energy_kept,
    random_overlap,
    subspace_overlap,
)
from lightning_safety.monitoring.table import comparison_table

__all__ = [
    "CONTENT_WARNING",
    "Activations",
    "Agreement",
    "AttackSuccessRate",
    "ClassifierJudge",
    "DriftRow",
    "DriftSummary",
    "FunctionJudge",
    "GuardModelJudge",
    "Harmfulness",
    "Judge",
    "JudgeFunction",
    "JudgedReply",
    "KeywordRefusalJudge",
    "LabelledReply",
    "LayerComparison",
    "LeftBasis",
    "OutcomeChange",
    "OverRefusalRate",
    "OwnReplies",
    "Perplexity",
    "Projection",
    "PromptSource",
    "Rate",
    "RefusalClassifier",
    "RefusalRate",
    "RepeatedComparison",
    "RubricJudge",
    "SafetyEvaluation",
    "SafetyRate",
    "Separability",
    "UnscoredRate",
    "Verdict",
    "agreement",
    "agreement_table",
    "as_judge",
    "attack_success_rate",
    "check_layers",
    "compare_activations",
    "compare_checkpoints",
    "compare_outcomes",
    "comparison_table",
    "direction_cosines",
    "draw_activation_overlap",
    "energy_kept_ratio",
    "evaluate_safety",
    "exact_match",
    "judge_replies",
    "last_token_activations",
    "left_basis",
    "linear_separability",
    "measure_harmfulness",
    "over_refusal_rate",
    "paired_increase_p_value",
    "perplexity",
    "project_checkpoint",
    "project_update",
    "project_weights",
    "random_basis",
    "random_directions",
    "random_energy_kept",
    "random_overlap",
    "read_labelled_replies",
    "read_prompts",
    "refusal_direction_cosine",
    "refusal_margin",
    "refusal_rate",
    "smallest_detectable_increase",
    "subspace_overlap",
    "summarise_drift",
    "unscored_rate",
]
