# SPDX-License-Identifier: Apache-2.0
"""Masks: what they hold, set operations, and the fit to a model."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_safety.scoring import SafetyMask, select_top
from lightning_safety.scoring.mask_indices import index_dtype
from tests.tiny import make_tiny_model

SHAPES = {"a": (2, 3), "b": (5,)}


def make_mask(a: set[int], b: set[int], **metadata: str) -> SafetyMask:
    indices = {"a": torch.tensor(sorted(a), dtype=torch.int64), "b": torch.tensor(sorted(b), dtype=torch.int64)}
    return SafetyMask(indices, SHAPES, metadata)


def entries(mask: SafetyMask) -> set[tuple[str, int]]:
    return {(name, place) for name, index in mask.indices.items() for place in index.tolist()}


def test_counts_and_representation() -> None:
    mask = make_mask({0, 5}, set(), method="top")
    assert (mask.count, mask.scored, mask.fraction) == (2, 11, 2 / 11)
    assert repr(mask) == "SafetyMask(2 of 11 weights (18.2 %) in 2 tensors, method=top)"
    assert {name: index.dtype for name, index in mask.indices.items()} == {"a": torch.int32, "b": torch.int32}
    assert SafetyMask({}, {}).fraction == 0.0


def test_large_tensors_get_64_bit_indices() -> None:
    entries = 2**31
    mask = SafetyMask(
        {"huge": torch.tensor([entries - 1]), "large": torch.tensor([0])}, {"huge": (entries,), "large": (entries - 1,)}
    )
    assert mask.indices["huge"].dtype == torch.int64
    assert mask.indices["large"].dtype == torch.int32 == index_dtype(entries - 1)


def test_equality_is_about_what_is_selected() -> None:
    mask = make_mask({1}, {2}, method="top")
    assert mask == make_mask({1}, {2}, method="random")
    assert mask != make_mask({1}, {3})
    assert mask != SafetyMask(mask.indices, {"a": (3, 2), "b": (5,)})
    assert mask != "mask"
    with pytest.raises(TypeError, match="unhashable"):
        hash(mask)


sets = st.tuples(st.sets(st.integers(0, 5)), st.sets(st.integers(0, 4)))


@given(left=sets, right=sets)
def test_operations_are_those_of_sets(left: tuple[set[int], set[int]], right: tuple[set[int], set[int]]) -> None:
    first, second = make_mask(*left), make_mask(*right)
    assert entries(first & second) == entries(first) & entries(second)
    assert entries(first | second) == entries(first) | entries(second)
    assert entries(first - second) == entries(first) - entries(second)
    assert first.overlap(second) == len(entries(first) & entries(second))


def test_results_record_where_they_come_from() -> None:
    result = make_mask({0, 1}, set(), method="top", fraction="0.01") - make_mask({1}, set(), method="bottom")
    assert result.metadata == {
        "method": "difference",
        "left.method": "top",
        "left.fraction": "0.01",
        "right.method": "bottom",
    }
    assert (result | result).metadata["left.right.method"] == "bottom"


def test_operations_need_the_same_tensors() -> None:
    mask = make_mask({0}, {0})
    with pytest.raises(ValueError, match="`a` is 2×3 in one and 3×2 in the other"):
        mask & SafetyMask(mask.indices, {"a": (3, 2), "b": (5,)})
    with pytest.raises(ValueError, match="`b` is 5 in one and absent in the other"):
        mask | SafetyMask({"a": torch.tensor([0])}, {"a": (2, 3)})
    with pytest.raises(TypeError, match="unsupported operand"):
        mask - {"a"}  # type: ignore[operator]


def test_overlap_takes_other_sets_of_tensors() -> None:
    mask = make_mask({0, 4}, {0})
    assert mask.overlap(SafetyMask({"a": torch.tensor([4, 5]), "c": torch.tensor([0])}, {"a": (2, 3), "c": (1,)})) == 1
    with pytest.raises(ValueError, match="`a` is 2×3 in one and 6 in the other"):
        mask.overlap(SafetyMask({"a": torch.tensor([4])}, {"a": (6,)}))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (torch.tensor([3, 1]), "sorted without duplicates"),
        (torch.tensor([1, 1]), "sorted without duplicates"),
        (torch.tensor([-1, 1]), r"in \[0, 6\) for shape \[2, 3\] but got -1"),
        (torch.tensor([0, 6]), r"in \[0, 6\) for shape \[2, 3\] but got 6"),
        (torch.tensor([2**40]), "but got 1099511627776"),
        (torch.arange(7), "but got 6"),
    ],
)
def test_bad_indices_are_refused(index: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SafetyMask({"a": index, "b": torch.tensor([0])}, SHAPES)


@pytest.mark.parametrize(
    "index",
    [torch.tensor([1.0]), torch.tensor([True]), torch.tensor([[1]]), torch.tensor(1), torch.tensor([1]).short(), [1]],
)
def test_other_types_of_index_are_refused(index: Any) -> None:
    with pytest.raises(TypeError, match="Indices of `a` expected to be a 1-D int32 or int64 tensor"):
        SafetyMask({"a": index}, {"a": (6,)})


@pytest.mark.parametrize("shape", [(-1,), (2.0,), (True,), 6, None, (2**40, 2**40), ("6",)])
def test_bad_shapes_are_refused(shape: Any) -> None:
    with pytest.raises(ValueError, match="Shape of `a` expected"):
        SafetyMask({"a": torch.tensor([0])}, {"a": shape})


def test_names_and_metadata_are_checked() -> None:
    with pytest.raises(ValueError, match="`b` got a shape and no indices"):
        SafetyMask({"a": torch.tensor([0])}, SHAPES)
    with pytest.raises(ValueError, match="`c` got indices and no shape"):
        SafetyMask({"c": torch.tensor([0])}, {})
    with pytest.raises(TypeError, match="map strings to strings but got 'seed': 3"):
        SafetyMask({}, {}, {"seed": 3})  # type: ignore[dict-item]


def test_fits_its_own_model_however_wrapped() -> None:
    model = make_tiny_model()
    mask = select_top({name: weight.detach() for name, weight in model.named_parameters()}, 0.01)
    mask.check_model(model)
    mask.check_model(torch.nn.DataParallel(model))


def test_another_model_is_refused_with_the_closest_names() -> None:
    model = make_tiny_model(num_hidden_layers=1)
    weights = {name: weight.detach() for name, weight in make_tiny_model(intermediate_size=48).named_parameters()}
    mask = select_top(weights, 0.01, metadata={"model": "tiny/other"})
    with pytest.raises(ValueError, match="`mask` expected to fit the model") as caught:
        mask.check_model(model)
    message = str(caught.value)
    assert "12 of its 20 tensors do not" in message
    assert "`model.layers.0.mlp.gate_proj.weight`: 48×32 in the mask, 64×32 in the model." in message
    assert "`model.layers.1.self_attn.q_proj.weight`: no such weight. Did you mean `model.layers.0.self" in message
    assert "… and 7 more" in message
    assert "made from `tiny/other`" in message


def test_state_survives_a_weights_only_checkpoint() -> None:
    mask = make_mask({1, 2}, {4}, method="top", seed="3")
    buffer = io.BytesIO()
    torch.save(mask.state_dict(), buffer)
    buffer.seek(0)
    restored = SafetyMask.from_state_dict(torch.load(buffer, weights_only=True))
    assert restored == mask
    assert restored.metadata == mask.metadata
    assert list(restored.shapes) == ["a", "b"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 1 of a mask's state but got version 2"),
        ({"shapes": {"a": [2, 3]}}, "`b` got indices and no shape"),
        ({"indices": None}, "`state` expected"),
    ],
)
def test_other_states_are_refused(change: dict[str, Any], message: str) -> None:
    state = {**make_mask({1}, {2}).state_dict(), **change}
    if state["indices"] is None:
        del state["indices"]
    with pytest.raises(ValueError, match=message):
        SafetyMask.from_state_dict(state)
