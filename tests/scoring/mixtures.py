# SPDX-License-Identifier: Apache-2.0
"""Tiny random mixture-of-experts models of every known family, and one whose experts are modules of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

EXPERTS = 5
CHOSEN = 2

_COMMON = {
    "vocab_size": 512,
    "hidden_size": 16,
    "intermediate_size": 24,
    "moe_intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "num_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": CHOSEN,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPS = {"n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1}
_LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
_NO_HEAD_DIM = {"head_dim": None}
_LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "shared_expert_intermediate_size": 12,
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_SLIDING = {"layer_types": ["sliding_attention", "full_attention"]}
_MAMBA = {"mamba_dt_rank": 4, "mamba_d_state": 4, "attn_layer_period": 2, "attn_layer_offset": 1}

CONFIGS: dict[str, dict[str, Any]] = {
    "afmoe": {**_SLIDING, "num_dense_layers": 1, **_GROUPS},
    "cohere2_moe": _SLIDING,
    "deepseek_v2": {**_GROUPS, **_LATENT, **_NO_HEAD_DIM, "topk_method": "greedy"},
    "deepseek_v3": {**_GROUPS, **_LATENT, **_NO_HEAD_DIM},
    "dots1": _GROUPS,
    "ernie4_5_moe": {
        "moe_num_experts": EXPERTS,
        "moe_k": CHOSEN,
        "moe_layer_start_index": 1,
        "moe_num_shared_experts": 1,
    },
    "exaone_moe": {**_SLIDING, **_GROUPS, "mlp_layer_types": ["dense", "sparse"]},
    "flex_olmo": {},
    "gemma4_text": {
        "enable_moe_block": True,
        "top_k_experts": CHOSEN,
        "global_head_dim": 8,
        "vocab_size_per_layer_input": 512,
        "hidden_size_per_layer_input": 8,
    },
    "glm4_moe": _GROUPS,
    "glm4_moe_lite": {**_GROUPS, **_LATENT, **_NO_HEAD_DIM},
    "gpt_oss": _SLIDING,
    "granitemoe": {},
    "granitemoehybrid": {
        "layer_types": ["attention", "attention"],
        "shared_intermediate_size": 12,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
    },
    "granitemoeshared": {"shared_intermediate_size": 12},
    "hunyuan_v1_moe": {"moe_topk": CHOSEN, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "jamba": {**_MAMBA, "expert_layer_period": 1, "expert_layer_offset": 0},
    "lfm2_moe": {"layer_types": ["full_attention", "conv"], "num_dense_layers": 1},
    "llama4_text": {"intermediate_size_mlp": 24},
    "minimax": {"layer_types": ["linear_attention", "full_attention"]},
    "minimax_m2": {},
    "mixtral": {},
    "nemotron_h": {**_GROUPS, "layers_block_type": ["attention", "moe"], "moe_shared_expert_intermediate_size": 12},
    "olmoe": {},
    "phimoe": {},
    "qwen2_moe": {"shared_expert_intermediate_size": 12},
    "qwen3_5_moe_text": _LINEAR,
    "qwen3_moe": {},
    "qwen3_next": _LINEAR,
}


def make_mixture(family: str, seed: int = 0, **overrides: Any) -> Any:
    """A random model of a family, with routers that choose differently for different tokens, in eval mode."""
    known = CONFIG_MAPPING[family]().to_dict()
    settings = {name: value for name, value in _COMMON.items() if name in known}
    settings |= CONFIGS[family]
    settings = {name: value for name, value in settings.items() if value is not None} | overrides
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**settings)).eval()
        with torch.no_grad():
            for weight in routers_of(model).values():
                weight.normal_()
            for name, weight in model.named_parameters():
                if ".experts." in name and weight.dim() == 3:
                    # Spreads that differ, so that one of another expert or of all would be noticed.
                    weight.mul_(torch.linspace(1, 2, len(weight)).view(-1, 1, 1))
    return model


def routers_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights [experts, hidden] of the routers."""
    return {
        name: weight
        for name, weight in model.named_parameters()
        if weight.dim() == 2 and any(f".{part}." in name for part in ("router", "gate", "switch"))
        if ".self_attn." not in name and "proj_" not in name
    }


def starve(model: nn.Module, expert: int) -> None:
    """Make routers that choose 2 of 5 never choose this one: its logit is 0, and those of two others are above it."""
    with torch.no_grad():
        for weight in routers_of(model).values():
            pairs = weight[[0, 1]].clone()
            others = [number for number in range(EXPERTS) if number != expert]
            weight[others] = torch.cat([pairs, -pairs])
            weight[expert] = 0


def send_padding_to(model: Any, expert: int, padding: int) -> None:
    """Make this expert of a model of one layer get padding, and nothing else."""
    starve(model, expert)
    with torch.no_grad():
        embeddings = model.get_input_embeddings().weight
        embeddings[:, 0] = 0
        embeddings[padding, 0] = 50
        model.model.layers[0].self_attn.o_proj.weight[0] = 0
        model.model.layers[0].mlp.gate.weight[expert, 0] = 1000


class OneExpert(nn.Module):
    def __init__(self, gate_up: Tensor, down: Tensor) -> None:
        super().__init__()
        parts = dict(zip(("w1", "w3"), gate_up.chunk(2), strict=True)) | {"w2": down}
        for name, weight in parts.items():
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            layer.weight = nn.Parameter(weight.detach().clone())
            self.add_module(name, layer)

    def forward(self, hidden: Tensor) -> Tensor:
        output: Tensor = self.w2(functional.silu(self.w1(hidden)) * self.w3(hidden))
        return output


class SingleExperts(nn.Module):
    """A sparse block as much remote code has it: a linear router, and a list of modules that see their tokens only."""

    def __init__(self, fused: Any, experts: str, router: str) -> None:
        super().__init__()
        modules = [
            OneExpert(*weights) for weights in zip(fused.experts.gate_up_proj, fused.experts.down_proj, strict=True)
        ]
        self.names = experts, router
        self.add_module(experts, nn.ModuleList(modules))
        gate = nn.Linear(fused.gate.weight.shape[1], EXPERTS, bias=False)
        gate.weight = nn.Parameter(fused.gate.weight.detach().clone())
        self.add_module(router, gate)

    def forward(self, hidden: Tensor) -> Tensor:
        experts, router = (getattr(self, name) for name in self.names)
        tokens = hidden.reshape(-1, hidden.shape[-1])
        weights, chosen = router(tokens).float().softmax(dim=-1).topk(CHOSEN, dim=-1)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        output = torch.zeros_like(tokens)
        for number, expert in enumerate(experts):
            token, place = torch.where(chosen == number)
            if len(token):
                output = output.index_add(0, token, expert(tokens[token]) * weights[token, place, None])
        return output.view_as(hidden)


def with_single_experts(model: Any, experts: str = "experts", router: str = "gate") -> Any:
    """Replace the fused experts of a Mixtral by modules of the same weights."""
    for layer in model.model.layers:
        layer.mlp = SingleExperts(layer.mlp, experts, router)
    return model
