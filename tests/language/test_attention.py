# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from lightning_safety.enforcement.safety_gradient import safety_gradient
from lightning_safety.language.attention import FloatAttention
from lightning_safety.scoring import RefusalLikelihood, expected_safety_impact
from tests.tiny import make_tiny_model, make_tiny_tokenizer


class _Seen(TorchFunctionMode):
    """Notes in which dtype attention is computed."""

    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is functional.scaled_dot_product_attention:
            self.dtypes.append((args[0] if args else kwargs["query"]).dtype)
        return func(*args, **(kwargs or {}))


def _tensors(dtype):
    torch.manual_seed(0)
    return [torch.randn(2, 3, 5, 8).to(dtype).requires_grad_() for _ in range(3)]


def test_bfloat16_is_computed_in_float32_and_rounded_once():
    query, key, value = _tensors(torch.bfloat16)
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    with FloatAttention():
        found = functional.scaled_dot_product_attention(query, key, value=value, attn_mask=mask)
        found.float().sum().backward()
    expected = functional.scaled_dot_product_attention(query.float(), key.float(), value.float(), attn_mask=mask)
    assert torch.equal(found, expected.bfloat16())
    assert query.grad.dtype == torch.bfloat16


def test_a_mask_of_biases_comes_along():
    query, key, value = _tensors(torch.bfloat16)
    bias = torch.randn(5, 5).bfloat16()
    with FloatAttention():
        found = functional.scaled_dot_product_attention(query, key, value, bias)
    expected = functional.scaled_dot_product_attention(query.float(), key.float(), value.float(), bias.float())
    assert torch.equal(found, expected.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_other_precisions_are_left_alone(dtype):
    query, key, value = _tensors(dtype)
    with _Seen() as seen, FloatAttention():
        found = functional.scaled_dot_product_attention(query, key, value)
    assert seen.dtypes == [dtype]
    assert torch.equal(found, functional.scaled_dot_product_attention(query, key, value))


def test_autocast_gets_what_it_asks_for():
    query, key, value = _tensors(torch.float32)
    with torch.autocast("cpu", torch.bfloat16), _Seen() as seen, FloatAttention():
        found = functional.scaled_dot_product_attention(query, key, value)
        assert torch.is_autocast_enabled("cpu")
    assert seen.dtypes == [torch.float32]
    assert found.dtype == torch.bfloat16


def test_a_rehearsal_attends_in_float32_under_autocast():
    model, tokenizer = make_tiny_model(), make_tiny_tokenizer()
    objective = RefusalLikelihood(limit=2)
    [batch] = objective.batches(tokenizer, batch_size=2)
    with _Seen() as seen:
        safety_gradient(
            model,
            list(model.parameters()),
            objective,
            batch,
            forward_context=lambda: torch.autocast("cpu", torch.bfloat16),
        )
    assert set(seen.dtypes) == {torch.float32}


def test_scoring_attends_in_float32_under_autocast():
    with _Seen() as seen:
        expected_safety_impact(
            make_tiny_model(),
            RefusalLikelihood(limit=2),
            make_tiny_tokenizer(),
            autocast="bfloat16",
            show_progress=False,
        )
    assert set(seen.dtypes) == {torch.float32}
