# SPDX-License-Identifier: Apache-2.0
"""Milliseconds a reply of the judges that need nothing but this package, side by side in one run.

python benchmarks/judges.py
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

from side_by_side import compare

from lightning_safety.monitoring.judges import BUILT_IN_JUDGES

ROWS = Path(__file__).parents[1] / "refusal_classifier" / "test.jsonl"


def main() -> None:
    """Judge the held-out rows several times with each judge, in turns, and print medians and spread."""
    rows = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()]
    prompts, responses = [row["prompt"] for row in rows], [row["response"] for row in rows]
    judges = [make() for make in BUILT_IN_JUDGES.values()]
    for judge in judges:
        judge.score(prompts[:1], responses[:1])  # the first call reads the model file
    print(f"{len(rows)} replies\n")
    compare(
        {judge.name: partial(judge.score, prompts, responses) for judge in judges},
        rounds=7,
        unit="ms a reply",
        per_second=1000 / len(rows),
    )


if __name__ == "__main__":
    main()
