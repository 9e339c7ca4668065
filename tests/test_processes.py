# SPDX-License-Identifier: Apache-2.0
"""Shares of work, results in order, and errors that every process hears of; in three processes, and in one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_safety.processes import (
    check_alike,
    from_first,
    gather,
    gather_shares,
    map_in_rounds,
    rank,
    share_of,
    together,
    world_size,
)
from tests.spawned import run_in_processes

NUMBERS = (0, 1, 2, 3, 7)


def _outcome(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _fail_in(number: int, error: Exception) -> None:
    if rank() == number:
        raise error


def _fail_at_once() -> None:
    with together("Judging"):
        _fail_in(1, ValueError("no verdict\nand a second line"))


def _fail_before_a_gather() -> None:
    with together("Judging"):
        _fail_in(2, ZeroDivisionError())
        gather(1)


def _fail_in_an_inner_block() -> None:
    with together("A check"), together("Judging"):
        _fail_in(0, KeyError("judge"))
        gather_shares([rank()])


def _fail_outside_of_an_inner_block() -> None:
    with together("A check"):
        _fail_in(1, ValueError("early"))
        with together("Judging"):
            gather(1)


def _fail_with_another_error() -> None:
    with together("A check"):
        try:
            with together("Judging"):
                _fail_in(1, ValueError("first"))
        except ValueError as error:
            raise RuntimeError("second") from error


def _fail_to_send() -> None:
    with together("Judging"):
        gather((lambda: 0) if rank() == 1 else 0)


def _fail_in_several() -> None:
    with together("Judging"):
        raise ValueError(f"in {rank()}")


def _go_apart() -> None:
    if rank() == 0:
        gather(0)
    else:
        with together("Judging"):
            pass


FAILURES = {
    _fail_at_once: ("OtherProcessError: Judging failed in process 1 of 3: ValueError: no verdict", 1, "ValueError: no"),
    _fail_before_a_gather: (
        "OtherProcessError: Judging failed in process 2 of 3: ZeroDivisionError",
        2,
        "ZeroDivisionError: ",
    ),
    _fail_in_an_inner_block: ("OtherProcessError: Judging failed in process 0 of 3: KeyError: 'judge'", 0, "KeyError"),
    _fail_outside_of_an_inner_block: (
        "OtherProcessError: A check failed in process 1 of 3: ValueError: early",
        1,
        "ValueError: early",
    ),
    _fail_with_another_error: (
        "OtherProcessError: Judging failed in process 1 of 3: ValueError: first",
        1,
        "RuntimeError: second",
    ),
}


def _work() -> dict[str, Any]:
    found: dict[str, Any] = {
        "processes": (rank(), world_size()),
        "shares": [share_of(range(number)) for number in NUMBERS],
        "together": [gather_shares([item * 10 for item in share_of(range(number))]) for number in NUMBERS],
        "rounds": [list(map_in_rounds(lambda item: item * 10, range(number))) for number in NUMBERS],
        "gathered": gather(f"of {rank()}"),
        "first": from_first(rank()),
        "alike": _outcome(lambda: check_alike([1, 2], "prompts", "Copy them.")),
        "unlike": _outcome(lambda: check_alike(rank() == 2, "prompts", "Copy them.")),
        "unfit": _outcome(lambda: gather_shares([1] * rank())),
        "apart": _outcome(_go_apart),
        "several": _outcome(_fail_in_several),
        "unsent": _outcome(_fail_to_send),
    }
    for work in FAILURES:
        found[work.__name__] = _outcome(work)
    with together("What comes after all this"):
        found["after"] = gather(rank())
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    results = run_in_processes(tmp_path_factory.mktemp("group"), _work, processes=3)
    for result in results:
        assert isinstance(result, dict), result
    return results


def test_work_is_shared_out_and_comes_back_in_order(found: list[Any]) -> None:
    assert [one["processes"] for one in found] == [(0, 3), (1, 3), (2, 3)]
    assert [one["shares"] for one in found] == [
        [[], [0], [0], [0], [0, 3, 6]],
        [[], [], [1], [1], [1, 4]],
        [[], [], [], [2], [2, 5]],
    ]
    for one in found:
        assert one["together"] == [[item * 10 for item in range(number)] for number in NUMBERS]
        assert one["rounds"] == one["together"]
        assert one["gathered"] == ["of 0", "of 1", "of 2"]
        assert one["first"] == 0
        assert one["after"] == [0, 1, 2]


def test_what_must_be_alike_is_compared_in_every_process(found: list[Any]) -> None:
    message = (
        "ValueError: `prompts` expected to be the same in all 3 processes but process 2 has another than process 0. "
        "Copy them."
    )
    for one in found:
        assert one["alike"] is None
        assert one["unlike"] == message
        assert one["unfit"].startswith("ValueError: `share` expected to hold one result for each item")


@pytest.mark.parametrize("work", FAILURES, ids=lambda work: work.__name__.strip("_"))
def test_a_failure_in_one_process_ends_every_one(found: list[Any], work: Callable[[], None]) -> None:
    elsewhere, failed, own = FAILURES[work]
    for number, one in enumerate(found):
        if number == failed:
            assert one[work.__name__].startswith(own)
        else:
            assert one[work.__name__] == elsewhere


def test_other_failures(found: list[Any]) -> None:
    for number, one in enumerate(found):
        # Each has an error of its own.
        assert one["several"] == f"ValueError: in {number}"
        assert "pickle" in one["unsent"]
        assert ("failed in process 1" in one["unsent"]) == (number != 1)
        assert one["apart"].startswith("OtherProcessError: The processes are at different places: ['value', 'done'")


def _die() -> None:
    with together("Judging"):
        if rank() == 1:
            os._exit(0)


def test_a_process_that_dies_ends_the_others(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"1\.pt"):
        run_in_processes(tmp_path, _die)
    assert "Error: " in torch.load(tmp_path / "0.pt")


def test_one_process_does_it_all() -> None:
    assert (rank(), world_size()) == (0, 1)
    assert share_of("abc") == ["a", "b", "c"]
    assert gather_shares(["a", "b"]) == ["a", "b"]
    assert gather(3) == [3]
    assert from_first(3) == 3
    check_alike(3, "number", "Fix it.")
    with pytest.raises(ValueError, match="own"), together("Judging"):
        raise ValueError("own")
