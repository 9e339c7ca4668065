# SPDX-License-Identifier: Apache-2.0
"""Loaders of batches: one for training that continues after a restart with the next batch, one for evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_safety.data import IGNORED_LABEL, TokenizedExample, pad_batch
from lightning_safety.training.order import BatchOrder

Collate = Callable[[Sequence[int]], dict[str, Tensor]]
"""Makes the batch of the rows with these indices."""


class Position(NamedTuple):
    """Where a fit stands.

    Attributes:
        epoch: Epochs completed.
        batch: Batches of this epoch that were trained on.
        end: Batches that this epoch uses at most.
    """

    epoch: int
    batch: int
    end: int


class ResumableLoader:
    """Serves the batches of one epoch per iteration, in an order that depends on seed and epoch alone.

    Not a `torch.utils.data.DataLoader`: the rows are in memory, and Lightning would re-create one with another sampler.

    Used on its own, each iteration is the next epoch, and after `load_state_dict` the first iteration continues with
    the batch after the last one served. Inside a fit `find_position` asks the trainer's counters instead. They are
    exact where the loader's own count cannot be: Lightning loads no loader state from a checkpoint of an epoch's end,
    nor if `trainer.estimated_stepping_batches` was read before; ``limit_train_batches`` ends an epoch early; and
    a checkpoint written on Ctrl-C holds a batch that was served but not trained on.

    Args:
        order: Which rows make up which batch.
        collate: Makes the batch of rows.
        find_position: Given this loader, returns where to start, or None to count here. It is asked when the first
            batch of an iteration is.

    Example:
        >>> import torch
        >>> order = BatchOrder([[1] * 6], batch_size=2)
        >>> def collate(rows): return {"rows": torch.tensor(rows)}
        >>> loader = ResumableLoader(order, collate)
        >>> first = next(iter(loader))
        >>> resumed = ResumableLoader(order, collate)
        >>> resumed.load_state_dict(loader.state_dict())
        >>> [batch["rows"].tolist() for batch in resumed] == order.batches(epoch=0)[1:]
        True
    """

    def __init__(
        self,
        order: BatchOrder,
        collate: Collate,
        *,
        find_position: Callable[[ResumableLoader], Position | None] | None = None,
    ) -> None:
        self._order = order
        self._collate = collate
        self._find_position = find_position
        self._epoch = 0
        self._served = 0
        self._continues = True

    def __len__(self) -> int:
        """Return the number of batches of an epoch."""
        return len(self._order)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Yield batches; where to start is settled only when the first is asked for.

        Lightning calls ``iter`` more often than it uses the result, and before it has restored its counters.
        """
        found = None if self._find_position is None else self._find_position(self)
        start = self._own_position() if found is None else found
        self._epoch, self._continues = start.epoch, False
        for index, rows in enumerate(self._order.batches(start.epoch)[: start.end]):
            if index >= start.batch:
                # Before the yield: a state saved while this batch is trained on must count it.
                self._served = index + 1
                yield self._collate(rows)

    def state_dict(self) -> dict[str, int]:
        """Return the epoch, and how many of its batches were served."""
        return {"epoch": self._epoch, "position": self._served}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue, at the next iteration, where `state` was taken."""
        self._epoch, self._served, self._continues = state["epoch"], state["position"], True

    def _own_position(self) -> Position:
        if self._continues and self._served < len(self):
            return Position(self._epoch, self._served, len(self))
        return Position(self._epoch + 1, 0, len(self))


class EvaluationLoader:
    """Serves the same batches in every iteration.

    It has no state on purpose: an interrupted validation starts again from its first batch.

    Args:
        batches: For each batch the indices of its rows.
        collate: Makes the batch of rows.
    """

    def __init__(self, batches: Sequence[Sequence[int]], collate: Collate) -> None:
        self._batches = batches
        self._collate = collate

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self._batches)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Yield the batches."""
        return map(self._collate, self._batches)


class Collator:
    """Makes the batch of the rows with given indices.

    Args:
        rows: The rows of each source.
        columns: What each row has beside its tokens: names, and a value for each source. ``unlikely`` becomes labels.
        pad_token: The token to pad with.
    """

    def __init__(
        self, rows: Sequence[Sequence[TokenizedExample]], columns: Mapping[str, Sequence[Any]], pad_token: int
    ) -> None:
        self._rows = [row for part in rows for row in part]
        self._columns = {
            name: torch.tensor([value for value, part in zip(values, rows, strict=True) for _ in part])
            for name, values in columns.items()
        }
        self._pad_token = pad_token

    def __call__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Return what `pad_batch` makes of the rows, and the columns."""
        if not indices:
            # A process may have no row left, but must take part in what the others' models do.
            return self([0]) | {"filler": torch.tensor([True])}
        batch = pad_batch([self._rows[index] for index in indices], pad_token_id=self._pad_token)
        columns = {name: values[list(indices)] for name, values in self._columns.items()}
        if "unlikely" in columns:
            # Apart from `labels`: a module that does not know them must not learn them.
            avoided, labels = columns["unlikely"].unsqueeze(1), batch["labels"]
            columns["unlikely"] = labels.masked_fill(~avoided, IGNORED_LABEL)
            batch["labels"] = labels.masked_fill(avoided, IGNORED_LABEL)
        return batch | columns
