# SPDX-License-Identifier: Apache-2.0
"""Progress bars for what takes over two seconds, on rank zero only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch.distributed
from tqdm.auto import tqdm

Item = TypeVar("Item")


def is_rank_zero() -> bool:
    """Whether this process is the only one or the first of its group."""
    ready = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not ready or torch.distributed.get_rank() == 0


def track(items: Iterable[Item], description: str, *, total: int | None = None, enabled: bool = True) -> Iterator[Item]:
    """Iterate over `items` behind a bar that appears after two seconds and clears itself at the end."""
    bar = tqdm(
        items,
        desc=description,
        total=total,
        disable=not (enabled and is_rank_zero()),
        delay=2.0,
        leave=False,
        dynamic_ncols=True,
    )
    yield from bar
