# SPDX-License-Identifier: Apache-2.0
"""What cells of studies find, made up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_safety.report.studies import StudyResults


def look(attacks: int, perplexity: float = 20.0, **more: Any) -> dict[str, Any]:
    """Return a look of 50 harmful prompts; the second judge sees one success more."""

    def rates(successes: int) -> dict[str, Any]:
        of = {"attack_success_rate": successes, "over_refusal_rate": 2}
        return {name: {"successes": count, "scored": 50, "total": 50} for name, count in of.items()}

    return {
        "rates": {"keyword_refusal": rates(attacks), "refusal_classifier": rates(attacks + 1)},
        "perplexity": {"value": perplexity, "low": perplexity - 1, "high": None},
        "exact_match": {"successes": 6, "scored": 60, "total": 60},
        **more,
    }


def results(found: Mapping[str, Mapping[str, Any]], **missing: float) -> StudyResults:
    """Return cells of an hour each on one machine."""
    taken = {name: {"seconds": 3600.0, "machine": "a machine", **one} for name, one in found.items()}
    return StudyResults(taken, missing)
