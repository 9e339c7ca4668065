# SPDX-License-Identifier: Apache-2.0
"""Several matrices at a time: results in order, errors passed on, and the number of threads as before."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from lightning_safety.monitoring.cores import map_over_cores


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_results_are_in_order_and_equal_those_of_one_core() -> None:
    matrices = [torch.randn(20 + number, 20, generator=torch.Generator().manual_seed(number)) for number in range(12)]
    found = map_over_cores(lambda matrix: (threading.get_ident(), torch.linalg.svdvals(matrix)), matrices)
    assert threading.get_ident() not in {thread for thread, _ in found}
    expected = [torch.linalg.svdvals(matrix) for matrix in matrices]
    assert all(torch.allclose(values, exact) for (_, values), exact in zip(found, expected, strict=True))
    assert torch.get_num_threads() == 2


def test_an_error_is_passed_on_and_the_threads_are_as_before() -> None:
    def fail(number: int) -> int:
        if number == 3:
            raise ValueError("the third")
        return number

    with pytest.raises(ValueError, match="the third"):
        map_over_cores(fail, range(5))
    assert torch.get_num_threads() == 2


def test_one_thread_stays_where_it_is() -> None:
    torch.set_num_threads(1)
    assert set(map_over_cores(lambda _: threading.get_ident(), range(3))) == {threading.get_ident()}
