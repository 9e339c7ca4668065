# SPDX-License-Identifier: Apache-2.0
"""From which density on the product with a sparse matrix is faster as a dense one: forward and backward, 512 tokens.

python benchmarks/sparse_products.py
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from side_by_side import compare
from torch import Tensor

from lightning_safety.enforcement.matrix_entries import MatrixEntries, add_sparse_product

TOKENS = 512


def main() -> None:
    """Print a table for each shape."""
    torch.manual_seed(0)
    for shape in ((576, 576), (1536, 576)):
        ways = {}
        for density in (0.01, 0.05, 0.1, 0.2, 0.3, 0.5):
            indices = (torch.rand(shape[0] * shape[1]) < density).nonzero().squeeze(1)
            for dense in (False, True):
                entries = MatrixEntries.from_indices(indices, shape, dense=dense)
                ways[f"{density:.0%}, {'dense' if dense else 'sparse'}"] = forward_and_backward(entries)
        print(f"\n{shape[0]} × {shape[1]}\n")
        compare(ways, rounds=25, unit="ms", per_second=1000)


def forward_and_backward(entries: MatrixEntries) -> Callable[[], None]:
    """Return what computes a product and its gradients."""
    output = torch.randn(TOKENS, entries.shape[0])
    inputs = torch.randn(TOKENS, entries.shape[1], requires_grad=True)
    values = torch.randn(entries.count, requires_grad=True)
    upstream: Tensor = torch.randn_like(output)

    def run() -> None:
        add_sparse_product(output, inputs, values, entries).backward(upstream)
        inputs.grad = values.grad = None

    return run


if __name__ == "__main__":
    main()
