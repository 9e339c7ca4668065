# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch

from lightning_safety.scoring.finite import has_finite_norm, is_finite


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_not_finite_has_no_finite_norm(bad: float, dtype: torch.dtype) -> None:
    tensor = torch.ones(1000, dtype=dtype)
    assert has_finite_norm(tensor)
    assert is_finite(tensor)
    tensor[777] = bad
    assert not has_finite_norm(tensor)
    assert not is_finite(tensor)


def test_squares_of_large_entries_may_overflow_and_are_finite_all_the_same() -> None:
    assert not has_finite_norm(torch.full((4,), 3e38))
    assert is_finite(torch.full((4,), 3e38))


def test_an_empty_shard_is_finite() -> None:
    assert has_finite_norm(torch.empty(0))
    assert is_finite(torch.empty(0))
