# SPDX-License-Identifier: Apache-2.0
"""Work that several processes do together: who does which part, results in order, errors that all of them hear of.

Nothing is sent where there is one process: its share is everything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, distributed

Item = TypeVar("Item")
Result = TypeVar("Result")

# What a process sends: a value, that it has come to the end of `together`, or how it failed there.
_Message = tuple[Literal["value", "done", "failed"], Any]


class OtherProcessError(RuntimeError):
    """Ends this process since another one failed; the message says which, and how."""


def world_size() -> int:
    """Return the number of processes; 1 where there is no process group."""
    return distributed.get_world_size() if _has_group() else 1


def rank() -> int:
    """Return the number of this process, from 0."""
    return distributed.get_rank() if _has_group() else 0


def share_of(items: Sequence[Item]) -> list[Item]:
    """Return this process's part of what all share out: every so-manieth item, none where there are too few.

    Args:
        items: The same in every process.

    Example:
        >>> share_of(["a", "b", "c"])  # one process
        ['a', 'b', 'c']
    """
    return list(items[rank() :: world_size()])


def gather(value: Item) -> list[Item]:
    """Return the values of all processes, in the order of their numbers. Every process must call it.

    Args:
        value: Small, and without tensors on a device: it is pickled.

    Raises:
        OtherProcessError: Another process failed in `together`.
    """
    if world_size() == 1:
        return [value]
    return [content for _, content in _exchange(("value", value))]


def gather_shares(share: Sequence[Item]) -> list[Item]:
    """Return what all processes have made of their shares, in the order of what `share_of` was given.

    Args:
        share: One result for each item of this process's share, in order; as for `gather`.

    Raises:
        OtherProcessError: Another process failed in `together`.
        ValueError: The numbers of results are not those of shares.

    Example:
        >>> gather_shares([item.upper() for item in share_of(["a", "b", "c"])])
        ['A', 'B', 'C']
    """
    shares = gather(list(share))
    lengths = [len(one) for one in shares]
    number = sum(lengths)
    if lengths != [len(range(first, number, len(shares))) for first in range(len(shares))]:
        raise ValueError(
            f"`share` expected to hold one result for each item of a process's share but the processes have {lengths}."
            " Share out the same items in every process, and return one result for each."
        )
    return [shares[index % len(shares)][index // len(shares)] for index in range(number)]


def map_in_rounds(function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """Yield the function's results in order; in each round every process computes one, and all hear of all.

    For results that are too large to wait for all of them. Every process must take them all.

    Args:
        function: Computes what `gather` can send.
        items: The same in every process.

    Example:
        >>> list(map_in_rounds(str.upper, ["a", "b", "c"]))
        ['A', 'B', 'C']
    """
    for start in range(0, len(items), world_size()):
        yield from gather_shares([function(item) for item in share_of(items[start : start + world_size()])])


def from_first(value: Item) -> Item:
    """Return the first process's value in every process, for what all must decide alike; as for `gather`."""
    return gather(value)[0]


def sum_over_processes(tensors: Iterable[Tensor], *, device: torch.device) -> None:
    """Replace each tensor by its sum over processes, the same bits in all. Every process must call it, with as many.

    Args:
        tensors: On any device.
        device: Where they are added up: the group's backend may know no other.

    Raises:
        OtherProcessError: Another process failed in `together`.
    """
    if world_size() == 1:
        return
    # None must wait for one that failed.
    gather(None)
    for tensor in tensors:
        there = tensor.to(device)
        distributed.all_reduce(there)
        if there is not tensor:
            tensor.copy_(there)


def check_alike(value: object, name: str, remedy: str) -> None:
    """Raise in every process unless all have the same value. Every process must call it.

    Args:
        value: Small and comparable, such as a digest.
        name: What it is, for the message.
        remedy: How to fix it, as a sentence.

    Raises:
        ValueError: Processes have different values.
    """
    values = gather(value)
    others = [number for number, other in enumerate(values) if other != values[0]]
    if others:
        raise ValueError(
            f"`{name}` expected to be the same in all {len(values)} processes but process {others[0]} has another than"
            f" process 0. {remedy}"
        )


@contextmanager
def together(what: str) -> Iterator[None]:
    """Let no process go on, or wait, where one has failed inside: each ends with an error.

    The process that failed raises its own error; the others raise one that quotes it, when they come to the end or to
    the next `gather`. Blocks may be nested. Every process must enter them in the same order, and inside of one, only
    functions of this module may make processes wait for each other: another collective would wait for one that failed.

    Args:
        what: What is done inside, as the beginning of a sentence: "Judging the replies".

    Raises:
        OtherProcessError: Another process failed.

    Example:
        >>> with together("Judging the replies"):
        ...     verdicts = gather_shares([len(reply) > 2 for reply in share_of(["No.", "OK"])])
        >>> verdicts
        [True, False]
    """
    try:
        yield
    except Exception as error:
        # The others have ended where they have heard of it already: in a block inside of this one, or from another.
        if world_size() > 1 and not _is_known(error):
            error._known_to_other_processes = True  # type: ignore[attr-defined]
            first_line = next(iter(str(error).splitlines()), "")
            # Where they cannot be told, they have ended too, and this error says more than that one.
            with suppress(Exception):
                _send(("failed", f"{what} failed in process {rank()} of {world_size()}: {_name(error)}{first_line}"))
        raise
    if world_size() > 1:
        _exchange(("done", None))


@contextmanager
def unannounced() -> Iterator[None]:
    """Inside of `together`, let an error end this process without telling the others: they may be in a collective.

    They end when this process does, and their connection to it breaks.
    """
    try:
        yield
    except Exception as error:
        error._known_to_other_processes = True  # type: ignore[attr-defined]
        raise


def _has_group() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def _exchange(message: _Message) -> list[_Message]:
    """Return the messages of all processes, which must be of one kind."""
    messages = _send(message)
    for kind, content in messages:
        if kind == "failed":
            raise OtherProcessError(content)
    kinds = [kind for kind, _ in messages]
    if len(set(kinds)) > 1:
        # All of them see it.
        raise OtherProcessError(f"The processes are at different places: {kinds}. Run the same code in each.")
    return messages


def _send(message: _Message) -> list[_Message]:
    messages: list[Any] = [None] * world_size()
    distributed.all_gather_object(messages, message)
    return messages


def _is_known(error: BaseException | None) -> bool:
    """Whether the other processes know of an error, or of one that it was raised from."""
    while error is not None:
        if isinstance(error, OtherProcessError) or getattr(error, "_known_to_other_processes", False):
            return True
        error = error.__cause__ or error.__context__
    return False


def _name(error: Exception) -> str:
    return f"{type(error).__name__}: " if str(error) else type(error).__name__
