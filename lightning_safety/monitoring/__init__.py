# SPDX-License-Identifier: Apache-2.0
"""Judges of replies, rates with intervals, perplexity, and an evaluation that puts them side by side."""

from __future__ import annotations

from lightning_safety.monitoring.agreement import (
    Agreement,
    LabelledReply,
    agreement,
    agreement_table,
    read_labelled_replies,
)
from lightning_safety.monitoring.evaluation import CONTENT_WARNING, SafetyEvaluation, evaluate_safety
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
from lightning_safety.monitoring.perplexity import Perplexity, perplexity
from lightning_safety.monitoring.rates import (
    Rate,
    attack_success_rate,
    over_refusal_rate,
    refusal_rate,
    unscored_rate,
)
from lightning_safety.monitoring.sets import PromptSource, read_prompts
from lightning_safety.monitoring.table import comparison_table

__all__ = [
    "CONTENT_WARNING",
    "Agreement",
    "AttackSuccessRate",
    "ClassifierJudge",
    "FunctionJudge",
    "GuardModelJudge",
    "Harmfulness",
    "Judge",
    "JudgeFunction",
    "JudgedReply",
    "KeywordRefusalJudge",
    "LabelledReply",
    "OverRefusalRate",
    "Perplexity",
    "PromptSource",
    "Rate",
    "RefusalClassifier",
    "RefusalRate",
    "RubricJudge",
    "SafetyEvaluation",
    "SafetyRate",
    "UnscoredRate",
    "Verdict",
    "agreement",
    "agreement_table",
    "as_judge",
    "attack_success_rate",
    "comparison_table",
    "evaluate_safety",
    "judge_replies",
    "measure_harmfulness",
    "over_refusal_rate",
    "perplexity",
    "read_labelled_replies",
    "read_prompts",
    "refusal_margin",
    "refusal_rate",
    "unscored_rate",
]
