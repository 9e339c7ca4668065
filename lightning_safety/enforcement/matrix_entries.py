# SPDX-License-Identifier: Apache-2.0
"""Products with a matrix of which only selected entries are there: the sparse part of a linear layer."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Above this share of the rectangle of used rows and columns a dense product is faster (benchmarks/sparse_products.py).
_DENSE_FROM = 0.4
_SPARSE_DTYPES = (torch.float32, torch.float64)
# On a CPU a product of so many tokens is still in its cache when it is turned around and added.
_TOKENS_AT_ONCE = 256


@dataclass(frozen=True)
class MatrixEntries:
    """Places in a matrix [out, in], laid out for sparse products with it. Values come separately, in row-major order.

    Only the columns that hold an entry are taken from an input, and only the rows that do from an output gradient.

    Attributes:
        shape: (out, in).
        rows: int64 [used rows], sorted.
        columns: int64 [used columns], sorted.
        row_starts: int64 [out + 1]: where each row's entries begin.
        used_row_starts: int64 [used rows + 1], the same without the empty rows.
        entry_columns: int64 [entries]: which of `columns`.
        column_starts: int64 [in + 1]: where each column's entries begin in column-major order.
        entry_rows: int64 [entries], in column-major order: which of `rows`.
        by_column: int64 [entries]: for each entry in column-major order its place in row-major order.
        dense: Whether products take the whole rectangle of used rows and columns.
    """

    shape: tuple[int, int]
    rows: Tensor
    columns: Tensor
    row_starts: Tensor
    used_row_starts: Tensor
    entry_columns: Tensor
    column_starts: Tensor
    entry_rows: Tensor
    by_column: Tensor
    dense: bool

    @classmethod
    def from_indices(cls, indices: Tensor, shape: tuple[int, int], *, dense: bool | None = None) -> Self:
        """Lay out flat (row-major) indices, sorted and without duplicates, into a matrix of this shape.

        Args:
            indices: int32 or int64 [entries], on any device; the layout is made there.
            shape: (out, in).
            dense: Whether products are dense. None: whichever is faster.

        Example:
            >>> entries = MatrixEntries.from_indices(torch.tensor([1, 5]), (2, 3))
            >>> entries.rows.tolist(), entries.columns.tolist(), entries.count
            ([0, 1], [1, 2], 2)
        """
        indices = indices.long()
        row, column = indices // shape[1], indices % shape[1]
        rows, entry_row = torch.unique(row, return_inverse=True)
        columns, entry_column = torch.unique(column, return_inverse=True)
        by_column = torch.argsort(column, stable=True)
        if dense is None:
            # Sparse products are not to be had on every device.
            dense = indices.device.type not in ("cpu", "cuda") or (
                indices.numel() > _DENSE_FROM * rows.numel() * columns.numel()
            )
        return cls(
            shape=shape,
            rows=rows,
            columns=columns,
            row_starts=_starts(row, shape[0]),
            used_row_starts=_starts(entry_row, rows.numel()),
            entry_columns=entry_column,
            column_starts=_starts(column, shape[1]),
            entry_rows=entry_row[by_column],
            by_column=by_column,
            dense=dense,
        )

    @property
    def count(self) -> int:
        """Number of entries."""
        return self.entry_columns.numel()

    @property
    def bytes(self) -> int:
        """Memory of the layout, in bytes."""
        return sum(value.nbytes for value in self._tensors().values())

    def to(self, device: torch.device) -> MatrixEntries:
        """Return the layout on a device; itself where it is there already."""
        if self.rows.device == device:
            return self
        moved: dict[str, Any] = {name: value.to(device) for name, value in self._tensors().items()}
        return MatrixEntries(shape=self.shape, dense=self.dense, **moved)

    def _tensors(self) -> dict[str, Tensor]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    # The matrix C that holds `values` at the entries -----------------------------------------------------------------

    def matrix(self, values: Tensor) -> Tensor:
        """Return the used columns of C, [out, used columns]; sparse unless products are dense."""
        size = (self.shape[0], self.columns.numel())
        if self.dense:
            return _filled(values, _row_of_each(self.row_starts) * size[1] + self.entry_columns, size)
        return _sparse(self.row_starts, self.entry_columns, values, size)

    def transposed_matrix(self, values: Tensor) -> Tensor:
        """Return the used rows of C, transposed, [in, used rows]; sparse unless products are dense."""
        size, values = (self.shape[1], self.rows.numel()), values[self.by_column]
        if self.dense:
            return _filled(values, _row_of_each(self.column_starts) * size[1] + self.entry_rows, size)
        return _sparse(self.column_starts, self.entry_rows, values, size)

    def sampled(self, left: Tensor, right: Tensor) -> Tensor:
        """Return the entries of Y · Z, [entries], from Y's used rows [used rows, k] and Z's used columns [k, used]."""
        size = (self.rows.numel(), self.columns.numel())
        if self.dense:
            return (left @ right).view(-1)[_row_of_each(self.used_row_starts) * size[1] + self.entry_columns]
        pattern = _sparse(self.used_row_starts, self.entry_columns, left.new_zeros(self.count), size)
        sampled: Tensor = torch.sparse.sampled_addmm(pattern, left, right, beta=0.0)
        return sampled.values()

    def sampled_over_tokens(self, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the entries of Yᵀ · Z, [entries], from Y [..., out] and Z [..., in]: sums over all tokens."""
        total = torch.zeros(self.count, dtype=dtype, device=left.device)
        for some, others in zip(_in_parts(left), _in_parts(right), strict=True):
            total += self.sampled(_taken(some, self.rows, dtype), _taken(others, self.columns, dtype).t())
        return total


def entries_of_product(left: Tensor, right: Tensor, entries: MatrixEntries) -> Tensor:
    """Return the selected entries of a matrix product, differentiable in both factors.

    Args:
        left: [out, rank].
        right: [rank, in].
        entries: Which entries of the product [out, in].

    Returns:
        [entries], float32, or float64 where the factors are.
    """
    dtype = _product_dtype(left, right)
    apply: Any = _EntriesOfProduct.apply
    result: Tensor = apply(left.to(dtype), right.to(dtype), entries)
    return result


def add_sparse_product(
    output: Tensor, inputs: Tensor, values: Tensor, entries: MatrixEntries, scale: float = 1.0
) -> Tensor:
    """Return ``output + scale · inputs @ Cᵀ`` for the sparse matrix C [out, in]; differentiable in all three tensors.

    The product is computed in the dtype of `values`, whatever autocast says, and added in that of `output`.

    Args:
        output: [..., out].
        inputs: [..., in].
        values: [entries], float32 or float64: the entries of C.
        entries: Where they stand.
        scale: Factor of the product.

    Returns:
        [..., out], dtype of `output`.
    """
    apply: Any = _AddSparseProduct.apply
    result: Tensor = apply(output, inputs, values, entries, scale)
    return result


class _EntriesOfProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor, entries: MatrixEntries) -> Tensor:
        left, right = left[entries.rows], right[:, entries.columns]
        ctx.save_for_backward(left, right)
        ctx.entries = entries
        with torch.autocast(left.device.type, enabled=False):
            return entries.sampled(left, right)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        left, right = ctx.saved_tensors
        with torch.autocast(left.device.type, enabled=False):
            left_gradient = _multiply(ctx.entries.matrix(gradient), right.t().contiguous())
            right_gradient = _multiply(ctx.entries.transposed_matrix(gradient), left)
        return left_gradient, right_gradient.t(), None


class _AddSparseProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, output: Tensor, inputs: Tensor, values: Tensor, entries: MatrixEntries, scale: float
    ) -> Tensor:
        ctx.save_for_backward(inputs, values)
        ctx.entries, ctx.scale = entries, scale
        # A result with the strides of the product would slow down every step that follows.
        result = torch.empty_like(output, memory_format=torch.contiguous_format)
        matrix = entries.matrix(values * scale)
        with torch.autocast(values.device.type, enabled=False):
            for source, added, target in zip(*map(_in_parts, (inputs, output, result)), strict=True):
                product = _multiply(matrix, _taken(source, entries.columns, values.dtype))
                torch.add(added, product.t(), out=target)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, values = ctx.saved_tensors
        entries: MatrixEntries = ctx.entries
        inputs_gradient = torch.empty_like(inputs, memory_format=torch.contiguous_format)
        values_gradient = torch.zeros_like(values)
        matrix = entries.transposed_matrix(values * ctx.scale) if ctx.needs_input_grad[1] else None
        with torch.autocast(values.device.type, enabled=False):
            for upstream, source, target in zip(*map(_in_parts, (gradient, inputs, inputs_gradient)), strict=True):
                taken = _taken(upstream, entries.rows, values.dtype)
                if matrix is not None:
                    target.copy_(_multiply(matrix, taken).t())
                if ctx.needs_input_grad[2]:
                    columns = _taken(source, entries.columns, values.dtype)
                    values_gradient.add_(entries.sampled(taken, columns.t()), alpha=ctx.scale)
        return (
            gradient,
            inputs_gradient if matrix is not None else None,
            values_gradient if ctx.needs_input_grad[2] else None,
            None,
            None,
        )


def _in_parts(tensor: Tensor) -> tuple[Tensor, ...]:
    """Return a [..., features] tensor as views [tokens, features]; of a contiguous one they can be written to."""
    tokens = tensor.reshape(-1, tensor.shape[-1])
    return torch.split(tokens, _TOKENS_AT_ONCE) if tensor.device.type == "cpu" else (tokens,)


def _taken(tokens: Tensor, places: Tensor, dtype: torch.dtype) -> Tensor:
    """Return some columns of [tokens, features] as rows: [places, tokens], contiguous."""
    return tokens.t().index_select(0, places).to(dtype)


def _multiply(matrix: Tensor, dense: Tensor) -> Tensor:
    """Return the product of a sparse or dense matrix and a dense one."""
    if matrix.layout == torch.sparse_csr and dense.device.type == "cpu":
        # Twice as fast as `mm`, which other devices need.
        product: Tensor = torch.sparse.mm(matrix, dense, "sum")
        return product
    return torch.mm(matrix, dense)


def _sparse(starts: Tensor, places: Tensor, values: Tensor, size: tuple[int, int]) -> Tensor:
    # The layout is ours and right: checking it every time would cost more than the product.
    return torch.sparse_csr_tensor(starts, places, values, size=size, check_invariants=False)


# torch says once that this layout is in beta; whoever trains with held adapters can do nothing about it.
with warnings.catch_warnings():
    warnings.simplefilter("ignore", UserWarning)
    _sparse(torch.tensor([0, 0]), torch.tensor([], dtype=torch.int64), torch.tensor([]), (1, 1))


def _filled(values: Tensor, places: Tensor, size: tuple[int, int]) -> Tensor:
    """Return a dense matrix with values at flat places, and zeros elsewhere."""
    return values.new_zeros(size[0] * size[1]).index_copy_(0, places, values).view(size)


def _row_of_each(starts: Tensor) -> Tensor:
    """Return the row of each entry from where the rows begin."""
    lengths = starts.diff()
    return torch.repeat_interleave(torch.arange(lengths.numel(), device=lengths.device), lengths)


def _starts(sorted_or_not: Tensor, count: int) -> Tensor:
    """Return where each of `count` groups begins when entries are ordered by group. int64 [count + 1]."""
    lengths = torch.bincount(sorted_or_not, minlength=count)
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0))


def _product_dtype(left: Tensor, right: Tensor) -> torch.dtype:
    """Half precisions have no sparse products; the few entries cost little in float32."""
    widest = torch.promote_types(left.dtype, right.dtype)
    return widest if widest in _SPARSE_DTYPES else torch.float32
