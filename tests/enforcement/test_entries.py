# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch

from lightning_safety.enforcement.entries import (
    count_different_bits,
    gather_entries,
    scatter_entries,
    selected_parameters,
    snapshot_entries,
)
from tests.enforcement.toys import make_toy, toy_mask


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_flat_index_is_row_major_whatever_the_strides(dtype: torch.dtype, index_dtype: torch.dtype) -> None:
    indices = torch.tensor([0, 2, 7, 11], dtype=index_dtype)
    plain = torch.arange(12).reshape(3, 4).to(dtype)
    transposed = plain.t().contiguous().t()
    assert not transposed.is_contiguous()
    for tensor in (plain.clone(), transposed.clone(memory_format=torch.preserve_format)):
        assert gather_entries(tensor, indices).tolist() == [0, 2, 7, 11]
        scatter_entries(tensor, indices, torch.tensor([50, 51, 52, 53], dtype=dtype))
        expected = plain.flatten().clone()
        expected[indices.long()] = torch.tensor([50, 51, 52, 53], dtype=dtype)
        assert torch.equal(tensor.flatten(), expected)
        scatter_entries(tensor, indices, 0.0)
        assert gather_entries(tensor, indices).tolist() == [0, 0, 0, 0]
        assert tensor.count_nonzero() == 8


def test_gather_copies_and_leaves_the_graph() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    entries = gather_entries(weight, torch.tensor([1]))
    scatter_entries(weight, torch.tensor([1]), 5.0)
    assert entries.tolist() == [1.0]
    assert not entries.requires_grad
    assert weight.tolist() == [1.0, 5.0, 1.0]
    assert weight.is_leaf


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_bits_tell_zeros_apart_and_nan_from_nothing(dtype: torch.dtype) -> None:
    left = torch.tensor([0.0, torch.nan, torch.inf, 1.0], dtype=dtype)
    assert count_different_bits(left, left.clone()) == 0
    assert count_different_bits(left, torch.tensor([-0.0, torch.nan, -torch.inf, 1.0], dtype=dtype)) == 2


def test_selected_parameters_skip_tensors_without_selection_and_check_the_model() -> None:
    model, mask = make_toy(), toy_mask()
    assert [name for name, _, _ in selected_parameters(model, mask)] == ["embedding.weight", "middle.weight"]
    assert snapshot_entries(model, mask)["middle.weight"].tolist() == model.middle.weight.flatten()[3:5].tolist()
    with pytest.raises(ValueError, match=r"embedding\.weight"):
        selected_parameters(torch.nn.Linear(2, 2), mask)
