# SPDX-License-Identifier: Apache-2.0
"""Timing several ways of doing one thing in one run, in turns, so that whatever else the machine does hits all.

Also what scripts that use it share beside the timing: their arguments, tables, and a JSON file of all numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from lightning_safety.devices import processor_name
from lightning_safety.progress import track

PACKAGES = ("lightning-safety", "torch", "transformers", "tokenizers", "numpy", "pytorch-lightning")


def compare(ways: Mapping[str, Callable[[], object]], *, rounds: int, unit: str, per_second: float = 1.0) -> None:
    """Time each way once a round, and print medians and spread as a Markdown table.

    Args:
        ways: What to time, by name.
        rounds: How often.
        unit: What the columns are in.
        per_second: So many units are a second.
    """
    print_times(take_turns(ways, rounds=rounds), unit=unit, per_second=per_second)


def take_turns(
    ways: Mapping[str, Callable[[], object]], *, rounds: int, prepare: Callable[[str], object] | None = None
) -> dict[str, list[float]]:
    """Time each way once a round.

    The order is another one in each round, and the same in every run: what a way leaves behind, in caches say, is not
    always left to the same next one.

    Args:
        ways: What to time, by name.
        rounds: How often.
        prepare: Called with a way's name before its turn, outside of the time.

    Returns:
        Seconds of each round, by way.
    """
    times: dict[str, list[float]] = {name: [] for name in ways}
    order = random.Random(0)
    for _ in track(range(rounds), "Rounds"):
        for name in order.sample(list(ways), len(ways)):
            if prepare is not None:
                prepare(name)
            start = time.perf_counter()
            ways[name]()
            times[name].append(time.perf_counter() - start)
    return times


def print_times(
    times: Mapping[str, Sequence[float]], *, unit: str, per_second: float = 1.0, against: str | None = None
) -> None:
    """Print medians and spread as a Markdown table.

    Args:
        times: As `take_turns` returns them.
        unit: What the columns are in.
        per_second: So many units are a second.
        against: A way: another column gives the ratios to it, see `ratio`.
    """
    rounds = len(next(iter(times.values())))
    header = [f"{rounds} rounds", f"{unit}, median", "lowest", "highest"]
    if against is not None:
        header.append(f"against {against}")
    rows = []
    for name, seconds in times.items():
        found = [per_second * value for value in (statistics.median(seconds), min(seconds), max(seconds))]
        row = [name, *(f"{value:.2f}" for value in found)]
        rows.append(row if against is None else [*row, f"{ratio(seconds, times[against]):.3f} ×"])
    print_table(header, rows)


def print_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a Markdown table, and an empty line after it."""
    print(f"| {' | '.join(header)} |\n{'|---' * len(header)}|")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |")
    print(flush=True)


def ratio(seconds: Sequence[float], others: Sequence[float]) -> float:
    """Return the median of the ratios within rounds: what slows a whole round down takes no part in it."""
    return statistics.median(one / other for one, other in zip(seconds, others, strict=True))


def parse_arguments(description: str | None) -> argparse.Namespace:
    """Read `--json FILE` and `--quick`, print the machine, and return what was given.

    Args:
        description: The docstring of the script.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers to this file as well")
    parser.add_argument(
        "--quick", action="store_true", help="a tiny model, few rounds: the script works, its numbers mean nothing"
    )
    arguments = parser.parse_args()
    if arguments.json is not None:  # Better now than after half an hour.
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
    found = machine()
    print(
        f"{found['processor']} ({found['instructions']}), {found['cores']} cores, {found['threads']} threads, "
        + ", ".join(f"{name} {version}" for name, version in versions().items())
        + (". **A quick run: these numbers mean nothing.**" if arguments.quick else "")
        + "\n",
        flush=True,
    )
    return arguments


def write_json(arguments: argparse.Namespace, *, settings: Mapping[str, Any], **results: Any) -> None:
    """Write all numbers where `--json` says, with the machine and versions; do nothing where it was not given.

    Args:
        arguments: From `parse_arguments`.
        settings: What was measured.
        results: The numbers, by what they are.
    """
    if arguments.json is None:
        return
    record = {
        "quick": arguments.quick,
        "machine": machine(),
        "versions": versions(),
        "settings": dict(settings),
        **results,
    }
    arguments.json.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def summary(times: Mapping[str, Sequence[float]], *, against: str | None = None) -> dict[str, Any]:
    """Return times as JSON has them: median, lowest and highest of each way, every round, and ratios if wanted."""
    return {
        name: {
            "median_seconds": statistics.median(seconds),
            "lowest_seconds": min(seconds),
            "highest_seconds": max(seconds),
            "seconds": list(seconds),
            **({} if against is None else {f"against {against}": ratio(seconds, times[against])}),
        }
        for name, seconds in times.items()
    }


def machine() -> dict[str, Any]:
    """Return what the numbers depend on."""
    return {
        "processor": processor_name(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": platform.system(),
    }


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that matter."""
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in PACKAGES}
