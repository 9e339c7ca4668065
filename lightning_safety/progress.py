# SPDX-License-Identifier: Apache-2.0
"""Progress bars for what takes over two seconds, on rank zero only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm.auto import tqdm

from lightning_safety.processes import rank

Item = TypeVar("Item")


def track(items: Iterable[Item], description: str, *, total: int | None = None, enabled: bool = True) -> Iterator[Item]:
    """Iterate over `items` behind a bar that appears after two seconds and clears itself at the end."""
    bar = tqdm(
        items,
        desc=description,
        total=total,
        disable=not (enabled and rank() == 0),
        delay=2.0,
        leave=False,
        dynamic_ncols=True,
    )
    yield from bar
