# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_safety.training import BatchOrder, EvaluationLoader, Position, ResumableLoader


def collate(rows: Sequence[int]) -> dict[str, Tensor]:
    return {"rows": torch.tensor(rows)}


def make_loader(find_position: object = None) -> ResumableLoader:
    return ResumableLoader(BatchOrder([list(range(1, 24))], 3), collate, find_position=find_position)


def read(loader: ResumableLoader, epochs: int) -> list[list[int]]:
    return [batch["rows"].tolist() for _ in range(epochs) for batch in loader]


def test_each_iteration_is_the_next_epoch() -> None:
    order = BatchOrder([list(range(1, 24))], 3)
    assert read(make_loader(), 3) == [batch for epoch in range(3) for batch in order.batches(epoch)]
    assert len(make_loader()) == 8


def test_resumes_after_any_batch() -> None:
    whole = read(make_loader(), 3)
    loader, served = make_loader(), 0
    for _ in range(2):
        for _ in loader:
            served += 1
            resumed = make_loader()
            resumed.load_state_dict(loader.state_dict())
            assert read(resumed, 3)[: len(whole) - served] == whole[served:]


def test_a_state_taken_before_the_first_batch_or_just_loaded_is_the_same_state() -> None:
    fresh = make_loader()
    assert fresh.state_dict() == {"epoch": 0, "position": 0}
    fresh.load_state_dict({"epoch": 2, "position": 5})
    assert fresh.state_dict() == {"epoch": 2, "position": 5}


def test_unused_iterators_change_nothing() -> None:
    loader = make_loader()
    iter(loader), iter(loader)
    assert read(loader, 1) == read(make_loader(), 1)


def test_an_iteration_left_early_is_an_epoch() -> None:
    order = BatchOrder([list(range(1, 24))], 3)
    loader = make_loader()
    next(iter(loader))
    assert next(iter(loader))["rows"].tolist() == order.batches(1)[0]


def test_find_position_decides_and_is_asked_at_the_first_batch() -> None:
    place = Position(0, 0, 8)
    loader = make_loader(lambda asking: place if asking is loader else None)
    iterator = iter(loader)
    place = Position(4, 2, 5)
    order = BatchOrder([list(range(1, 24))], 3)
    assert [batch["rows"].tolist() for batch in iterator] == order.batches(4)[2:5]
    assert loader.state_dict() == {"epoch": 4, "position": 5}


def test_without_a_position_the_loader_counts_itself() -> None:
    assert read(make_loader(lambda asking: None), 2) == read(make_loader(), 2)


def test_evaluation_loader_serves_the_same_every_time_and_has_no_state() -> None:
    loader = EvaluationLoader([[2, 1], [0]], collate)
    next(iter(loader))
    for _ in range(2):
        assert [batch["rows"].tolist() for batch in loader] == [[2, 1], [0]]
    assert len(loader) == 2
    assert not hasattr(loader, "state_dict")
