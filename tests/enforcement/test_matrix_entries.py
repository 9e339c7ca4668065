# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_safety.enforcement.matrix_entries import MatrixEntries, add_sparse_product, entries_of_product

SHAPE = (7, 5)


def chosen(*flat: int) -> Tensor:
    return torch.tensor(flat, dtype=torch.int32)


def dense_of(values: Tensor, indices: Tensor, shape: tuple[int, int]) -> Tensor:
    return torch.zeros(shape[0] * shape[1], dtype=values.dtype).index_put((indices.long(),), values).view(shape)


@settings(max_examples=60, deadline=None)
@given(
    places=st.sets(st.integers(0, 34), min_size=1),
    dense=st.booleans(),
    scale=st.sampled_from([1.0, -1.0, 0.5]),
    seed=st.integers(0, 1000),
)
def test_products_and_gradients_are_those_of_the_dense_matrix(
    places: set[int], dense: bool, scale: float, seed: int
) -> None:
    indices = chosen(*sorted(places))
    entries = MatrixEntries.from_indices(indices, SHAPE, dense=dense)
    torch.manual_seed(seed)
    tensors = [
        torch.randn(*size, dtype=torch.float64, requires_grad=True) for size in ((2, 3, 7), (2, 3, 5), (7, 2), (2, 5))
    ]
    output, inputs, up, down = tensors
    found = add_sparse_product(output, inputs, entries_of_product(up, down, entries), entries, scale)
    product = (up @ down) * dense_of(torch.ones(len(places), dtype=torch.float64), indices, SHAPE)
    expected = output + scale * inputs @ product.t()
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)
    weights = torch.randn_like(found)
    for left, right in zip(
        torch.autograd.grad((found * weights).sum(), tensors),
        torch.autograd.grad((expected * weights).sum(), tensors),
        strict=True,
    ):
        assert torch.allclose(left, right, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dense", [False, True])
def test_half_precision_is_multiplied_in_float32(dense: bool) -> None:
    entries = MatrixEntries.from_indices(chosen(0, 8, 9, 34), SHAPE, dense=dense)
    torch.manual_seed(0)
    up, down = torch.randn(7, 2).bfloat16(), torch.randn(2, 5).bfloat16()
    inputs, output = torch.randn(3, 5).bfloat16(), torch.zeros(3, 7).bfloat16()
    values = entries_of_product(up, down, entries)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = add_sparse_product(output, inputs, values, entries)
    assert values.dtype == torch.float32
    assert found.dtype == torch.bfloat16
    expected = inputs.float() @ dense_of(values, chosen(0, 8, 9, 34), SHAPE).t()
    assert torch.equal(found, expected.bfloat16())


def test_an_input_that_needs_no_gradient_gets_none() -> None:
    entries = MatrixEntries.from_indices(chosen(3), SHAPE)
    values = torch.ones(1, requires_grad=True)
    inputs = torch.ones(2, 5)
    add_sparse_product(torch.zeros(2, 7), inputs, values, entries).sum().backward()
    assert inputs.grad is None
    assert values.grad is not None
    assert values.grad.item() == 2


def test_few_entries_are_sparse_and_a_full_rectangle_is_dense() -> None:
    sparse = MatrixEntries.from_indices(torch.arange(0, 100 * 50, 51), (100, 50))
    full = MatrixEntries.from_indices(torch.arange(100 * 50), (100, 50))
    assert (sparse.dense, full.dense) == (False, True)
    assert sparse.bytes < full.bytes
