# SPDX-License-Identifier: Apache-2.0
"""One matrix a core: decompositions of small matrices hardly gain from several cores, several of them at a time do."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

_MOST_AT_A_TIME = 4  # so that memory stays that of a few matrices on machines with many cores


def map_over_cores(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """Return the function's results in order, computed on several cores with one thread each.

    The number of threads that torch uses is one meanwhile, and as before afterwards.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        return [function(item) for item in items]
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(min(threads, _MOST_AT_A_TIME)) as pool:
            return list(pool.map(function, items))
    finally:
        torch.set_num_threads(threads)
