# SPDX-License-Identifier: Apache-2.0
"""Padding and bucketing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_safety.data import TokenizedExample, length_buckets, pad_batch

ROWS = [TokenizedExample([5, 6, 7], [-100, 6, 7]), TokenizedExample([8], [8])]


def test_padding_on_the_right():
    batch = pad_batch(ROWS, pad_token_id=9)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[5, 6, 7], [8, 9, 9]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
        "labels": [[-100, 6, 7], [8, -100, -100]],
    }
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_padding_on_the_left():
    batch = pad_batch(ROWS, pad_token_id=9, padding_side="left")
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[5, 6, 7], [9, 9, 8]],
        "attention_mask": [[1, 1, 1], [0, 0, 1]],
        "labels": [[-100, 6, 7], [-100, -100, 8]],
    }


def test_a_padding_token_that_is_also_a_real_one_is_attended_to_and_learned_where_it_is_real():
    batch = pad_batch([TokenizedExample([2, 2], [2, 2]), TokenizedExample([2], [2])], pad_token_id=2)
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert batch["labels"].tolist() == [[2, 2], [2, -100]]


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="at least one example"):
        pad_batch([], pad_token_id=0)
    with pytest.raises(ValueError, match="'left' or 'right' but got 'top'"):
        pad_batch(ROWS, pad_token_id=0, padding_side="top")
    with pytest.raises(ValueError, match=r"as long as `input_ids` \(2\) but got 1"):
        TokenizedExample([1, 2], [1])
    with pytest.raises(ValueError, match="`batch_size` expected to be at least 1"):
        length_buckets([1, 2], batch_size=0)


@given(lengths=st.lists(st.integers(0, 50)), batch_size=st.integers(1, 7))
def test_buckets_hold_every_index_once_longest_first(lengths, batch_size):
    buckets = length_buckets(lengths, batch_size)
    order = [index for bucket in buckets for index in bucket]
    assert sorted(order) == list(range(len(lengths)))
    assert all(len(bucket) == batch_size for bucket in buckets[:-1])
    assert all(1 <= len(bucket) <= batch_size for bucket in buckets)
    keys = [(-lengths[index], index) for index in order]
    assert keys == sorted(keys)
