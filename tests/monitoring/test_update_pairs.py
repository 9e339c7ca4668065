# SPDX-License-Identifier: Apache-2.0
"""Overlap of updates of one model, in cases where it is known."""

from __future__ import annotations

import pytest
import torch

from lightning_safety.monitoring.update_pairs import compare_updates


def low_rank(columns: slice, seed: int) -> torch.Tensor:
    """Return a matrix [40, 30] whose column space is spanned by some of the unit vectors."""
    drawn = torch.randn(40, 30, generator=torch.Generator().manual_seed(seed))
    kept = torch.zeros(40, 1)
    kept[columns] = 1
    return drawn * kept


def test_same_apart_and_random_updates():
    first = {"a": low_rank(slice(0, 10), 0), "norm": torch.ones(4)}
    same = {"a": first["a"] @ torch.linalg.qr(torch.randn(30, 30)).Q, "norm": torch.ones(4)}
    apart = {"a": low_rank(slice(20, 30), 1), "norm": torch.ones(4)}
    found = compare_updates({"first": first, "same": same, "apart": apart}, [0.5, 1.0])
    assert list(found) == ["first | same", "first | apart", "same | apart"]
    assert [row["energy"] for row in found["first | same"]] == [0.5, 1.0]
    assert all(row["overlap"] == pytest.approx(1, abs=1e-6) for row in found["first | same"])
    assert all(row["overlap"] == pytest.approx(0, abs=1e-9) for row in found["first | apart"])
    assert found["first | apart"][1]["overlap_random"] == 10 / 40


def test_random_updates_overlap_as_chance_says():
    generator = torch.Generator().manual_seed(0)
    updates = {
        name: {f"w{number}": torch.randn(64, 64, generator=generator) for number in range(40)} for name in ("a", "b")
    }
    (row,) = compare_updates(updates, [0.5])["a | b"]
    assert row["overlap"] == pytest.approx(row["overlap_random"], rel=0.03)


def test_matrices_that_did_not_move_are_left_out():
    moved = {"a": torch.eye(3), "b": torch.eye(3)}
    found = compare_updates({"x": moved, "y": {"a": torch.eye(3), "b": torch.zeros(3, 3)}}, [1.0])
    assert found["x | y"][0]["overlap"] == pytest.approx(1)
    still = {"a": torch.zeros(3, 3), "b": torch.zeros(3, 3)}
    assert compare_updates({"x": moved, "y": still}, [1.0])["x | y"][0]["overlap"] is None


def test_energies_out_of_range_are_refused():
    with pytest.raises(ValueError, match="`energies` expected to be"):
        compare_updates({"x": {"a": torch.eye(3)}, "y": {"a": torch.eye(3)}}, [1.5])
