# SPDX-License-Identifier: Apache-2.0
"""Judges: what says of a reply whether it is harmful and whether it refuses."""

from __future__ import annotations

from lightning_safety.monitoring.judges.built_in import BUILT_IN_JUDGES, built_in_judge
from lightning_safety.monitoring.judges.chat import RubricJudge
from lightning_safety.monitoring.judges.classifier import ClassifierJudge
from lightning_safety.monitoring.judges.guard import GuardModelJudge
from lightning_safety.monitoring.judges.keyword import KeywordRefusalJudge
from lightning_safety.monitoring.judges.protocol import (
    FunctionJudge,
    Judge,
    JudgeFunction,
    Verdict,
    as_judge,
    judge_replies,
)
from lightning_safety.monitoring.judges.refusal_classifier import RefusalClassifier

__all__ = [
    "BUILT_IN_JUDGES",
    "ClassifierJudge",
    "FunctionJudge",
    "GuardModelJudge",
    "Judge",
    "JudgeFunction",
    "KeywordRefusalJudge",
    "RefusalClassifier",
    "RubricJudge",
    "Verdict",
    "as_judge",
    "built_in_judge",
    "judge_replies",
]
