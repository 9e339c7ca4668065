# SPDX-License-Identifier: Apache-2.0
"""Timing several ways of doing one thing in one run, in turns, so that whatever else the machine does hits all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping


def compare(ways: Mapping[str, Callable[[], object]], *, rounds: int, unit: str, per_second: float = 1.0) -> None:
    """Time each way once a round, and print medians and spread as a Markdown table.

    Args:
        ways: What to time, by name.
        rounds: How often.
        unit: What the columns are in.
        per_second: So many units are a second.
    """
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, run in ways.items():
            start = time.perf_counter()
            run()
            times[name].append(per_second * (time.perf_counter() - start))
    print(f"| {rounds} rounds | {unit}, median | lowest | highest |\n|---|---|---|---|")
    for name, found in times.items():
        print(f"| {name} | {statistics.median(found):.2f} | {min(found):.2f} | {max(found):.2f} |")
