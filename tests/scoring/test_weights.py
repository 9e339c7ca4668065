# SPDX-License-Identifier: Apache-2.0
"""Which weights are scored, across architectures and wrappers, and their spread."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from lightning_safety.scoring import MixtureLayout, scored_weights, weight_spread
from tests.tiny import make_tiny_model

ATTENTION = [f"self_attn.{part}_proj.weight" for part in "qkvo"]
MLP = [f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")]
SMALL = {"num_attention_heads": 2, "num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 12, "vocab_size": 30}


def test_llama_with_a_tied_head() -> None:
    assert list(scored_weights(make_tiny_model())) == [
        f"model.layers.{layer}.{part}" for layer in range(2) for part in ATTENTION + MLP
    ]


def test_an_untied_head_is_scored() -> None:
    weights = scored_weights(make_tiny_model(tie_word_embeddings=False))
    assert list(weights)[-1] == "lm_head.weight"
    assert len(weights) == 15


def test_gpt2() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=30, n_positions=16))
    names = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    assert list(scored_weights(model)) == [f"transformer.h.0.{name}.weight" for name in names]


def test_gpt_neox() -> None:
    weights = scored_weights(GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL)))
    names = ["attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"]
    assert list(weights) == [*(f"gpt_neox.layers.0.{name}.weight" for name in names), "lm_head.weight"]


def test_mixtral_experts_without_their_router() -> None:
    weights = scored_weights(MixtralForCausalLM(MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=3)))
    experts = {name: tuple(weight.shape) for name, weight in weights.items() if "mlp" in name}
    assert experts == {
        "model.layers.0.mlp.experts.gate_up_proj": (3, 24, 8),
        "model.layers.0.mlp.experts.down_proj": (3, 8, 12),
    }


def test_shared_experts_without_their_gate() -> None:
    sizes = {
        "num_key_value_heads": 2,
        "num_experts": 3,
        "moe_intermediate_size": 6,
        "shared_expert_intermediate_size": 5,
    }
    weights = scored_weights(Qwen2MoeForCausalLM(Qwen2MoeConfig(**SMALL, **sizes)), include="*.mlp.*")
    shared = [f"shared_expert.{part}_proj.weight" for part in ("gate", "up", "down")]
    assert list(weights) == [
        f"model.layers.0.mlp.{name}" for name in ["experts.gate_up_proj", "experts.down_proj", *shared]
    ]


class OwnBlock(nn.Module):
    """Routers made of plain linear layers, as in remote code, and layers that only look like them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 4)
        self.conv = nn.Conv1d(4, 4, 3)
        self.position = nn.Parameter(torch.zeros(1, 2, 4))
        self.dense = nn.ModuleDict({"gate": nn.Linear(4, 4), "up": nn.Linear(4, 4)})
        self.block_sparse_moe = nn.ModuleDict({"gate": nn.Linear(4, 2), "experts": nn.ModuleList([nn.Linear(4, 4)])})
        self.feed_forward = nn.ModuleDict({"router": nn.Sequential(nn.Linear(4, 2))})
        self.norm = nn.LayerNorm(4)


def test_plain_linear_routers_and_lookalikes() -> None:
    layout = MixtureLayout(experts="*moe.experts", routers=["*moe.gate", "feed_forward.router"])
    assert list(scored_weights(OwnBlock(), mixture=layout)) == [
        "dense.gate.weight",
        "dense.up.weight",
        "block_sparse_moe.experts.0.weight",
    ]


def test_lora_and_compile_give_the_bare_names() -> None:
    names = list(scored_weights(make_tiny_model()))
    lora = get_peft_model(make_tiny_model(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    assert list(scored_weights(lora)) == names
    assert list(scored_weights(torch.compile(make_tiny_model()))) == names  # type: ignore[arg-type]


def test_patterns() -> None:
    model = make_tiny_model()
    assert len(scored_weights(model, include="*.mlp.*")) == 6
    assert len(scored_weights(model, include=["*.mlp.*", "*v_proj*"])) == 8
    assert len(scored_weights(model, exclude=["*.mlp.*"])) == 8
    assert list(scored_weights(model, include="*.0.*", exclude=["*mlp*", "*[kqo]_proj*"])) == [
        "model.layers.0.self_attn.v_proj.weight"
    ]


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_refused(argument: str) -> None:
    with pytest.raises(
        ValueError, match=rf"`{argument}` expected .*'model.layers.0.v_proj.weight' matches none.*Did you mean"
    ):
        scored_weights(make_tiny_model(), **{argument: ["*.mlp.*", "model.layers.0.v_proj.weight"]})
    with pytest.raises(ValueError, match=r"norms, embeddings.* are never scored"):
        scored_weights(make_tiny_model(), **{argument: "*embed_tokens*"})
    with pytest.raises(TypeError, match=rf"`{argument}` expected to be a pattern"):
        scored_weights(make_tiny_model(), **{argument: [3]})  # type: ignore[dict-item]


def test_nothing_left_is_refused() -> None:
    with pytest.raises(ValueError, match="leave weights to score but none of 14"):
        scored_weights(make_tiny_model(), exclude="*")
    with pytest.raises(ValueError, match="expected to have linear layers but Embedding has none"):
        scored_weights(nn.Embedding(3, 3))


def replace_weight(model: Any, weight: torch.Tensor) -> Any:
    layer = model.model.layers[1].mlp.up_proj
    del layer.weight
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return model


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float8_e4m3fn])
def test_quantised_weights_are_refused(dtype: torch.dtype) -> None:
    model = replace_weight(make_tiny_model(), torch.zeros(64, 32).to(dtype))
    with pytest.raises(
        ValueError, match=rf"`model.layers.1.mlp.up_proj.weight` is {dtype}. Quantised weights can be scored only"
    ):
        scored_weights(model)


def test_quantised_models_are_refused() -> None:
    model = make_tiny_model()
    model.is_quantized = True  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="is quantised"):
        scored_weights(model)


def test_weights_that_are_not_here_are_refused() -> None:
    with torch.device("meta"):
        model = make_tiny_model()
    with pytest.raises(ValueError, match="is on the meta device"):
        scored_weights(model)
    with pytest.raises(ValueError, match="is sharded"):
        scored_weights(replace_weight(make_tiny_model(), torch.zeros(0)))
    zero3 = make_tiny_model()
    zero3.model.layers[0].mlp.up_proj.weight.ds_id = 7  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"`model.layers.0.mlp.up_proj.weight` is sharded"):
        scored_weights(zero3)


def test_spread_is_that_of_the_population(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_safety.scoring.weights._CHUNK_ENTRIES", 50)
    weight = torch.randn(30, 7, generator=torch.Generator().manual_seed(0)) + 100
    torch.testing.assert_close(weight_spread(weight), weight.double().std(correction=0).float(), rtol=0, atol=0)
    torch.testing.assert_close(weight_spread(weight.bfloat16()), weight.bfloat16().double().std(correction=0).float())
    assert weight_spread(torch.ones(3, 3)) == 0


def test_spread_of_fused_experts_is_taken_slice_by_slice() -> None:
    experts = torch.stack([torch.randn(5, 6), 10 * torch.randn(5, 6) + 3])
    spread = weight_spread(experts)
    assert spread.shape == (2, 1, 1)
    torch.testing.assert_close(
        spread.flatten(), torch.stack([expert.double().std(correction=0) for expert in experts]).float()
    )
