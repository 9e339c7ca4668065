# SPDX-License-Identifier: Apache-2.0
"""Components and layers across architectures, shares and enrichment, the table and the picture."""

from __future__ import annotations

import builtins
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_safety.scoring import SafetyMask, describe_mask
from lightning_safety.scoring.components import COMPONENTS, component_of, layer_of

NAMES = {
    "llama": {
        "model.layers.3.self_attn.q_proj.weight": ("3", "q"),
        "model.layers.3.self_attn.k_proj.weight": ("3", "k"),
        "model.layers.3.self_attn.v_proj.weight": ("3", "v"),
        "model.layers.3.self_attn.o_proj.weight": ("3", "o"),
        "model.layers.3.mlp.gate_proj.weight": ("3", "gate"),
        "model.layers.3.mlp.up_proj.weight": ("3", "up"),
        "model.layers.3.mlp.down_proj.weight": ("3", "down"),
        "lm_head.weight": ("head", "head"),
    },
    "phi3": {
        "model.layers.31.self_attn.qkv_proj.weight": ("31", "qkv"),
        "model.layers.31.mlp.gate_up_proj.weight": ("31", "gate+up"),
    },
    "phi": {
        "model.layers.0.self_attn.dense.weight": ("0", "o"),
        "model.layers.0.mlp.fc1.weight": ("0", "up"),
        "model.layers.0.mlp.fc2.weight": ("0", "down"),
    },
    "gpt2": {
        "transformer.h.11.attn.c_attn.weight": ("11", "qkv"),
        "transformer.h.11.attn.c_proj.weight": ("11", "o"),
        "transformer.h.11.mlp.c_fc.weight": ("11", "up"),
        "transformer.h.11.mlp.c_proj.weight": ("11", "down"),
    },
    "gpt-neox": {
        "gpt_neox.layers.2.attention.query_key_value.weight": ("2", "qkv"),
        "gpt_neox.layers.2.attention.dense.weight": ("2", "o"),
        "gpt_neox.layers.2.mlp.dense_h_to_4h.weight": ("2", "up"),
        "gpt_neox.layers.2.mlp.dense_4h_to_h.weight": ("2", "down"),
        "embed_out.weight": ("head", "head"),
    },
    "mixtral, one module an expert": {
        "model.layers.5.block_sparse_moe.experts.7.w1.weight": ("5", "expert"),
        "model.layers.5.block_sparse_moe.experts.7.w2.weight": ("5", "expert"),
    },
    "mixtral, fused": {"model.layers.5.mlp.experts.down_proj": ("5", "expert")},
    "qwen2-moe": {"model.layers.5.mlp.shared_expert.down_proj.weight": ("5", "down")},
    "deepseek": {
        "model.layers.5.self_attn.q_b_proj.weight": ("5", "q"),
        "model.layers.5.self_attn.kv_a_proj_with_mqa.weight": ("5", "kv"),
        "model.layers.5.mlp.shared_experts.up_proj.weight": ("5", "up"),
    },
    "afmoe": {"model.layers.5.self_attn.gate_proj.weight": ("5", "gate_proj")},
    "mpt": {
        "transformer.blocks.4.attn.Wqkv.weight": ("4", "qkv"),
        "transformer.blocks.4.ffn.down_proj.weight": ("4", "down"),
    },
    "falcon": {"transformer.h.1.self_attention.dense.weight": ("1", "o")},
    "opt": {
        "model.decoder.layers.9.self_attn.out_proj.weight": ("9", "o"),
        "model.decoder.layers.9.fc1.weight": ("9", "up"),
    },
    "mamba": {"backbone.layers.6.mixer.in_proj.weight": ("6", "in_proj")},
    "nothing known": {"score.weight": ("other", "score")},
}


@pytest.mark.parametrize("architecture", NAMES)
def test_names_say_where_a_weight_is(architecture: str) -> None:
    found = {name: (layer_of(name), component_of(name)) for name in NAMES[architecture]}
    assert found == NAMES[architecture]


def test_three_dimensions_mean_experts() -> None:
    assert component_of("model.layers.0.block_sparse_moe.input_linear.weight", (8, 4, 4)) == "expert"
    assert component_of("model.layers.0.block_sparse_moe.input_linear.weight", (4, 4)) == "input_linear"


def make_mask(selected: dict[str, int], weights: dict[str, int]) -> SafetyMask:
    return SafetyMask(
        {name: torch.arange(selected.get(name, 0)) for name in weights},
        {name: (count,) for name, count in weights.items()},
        {"method": "top"},
    )


WEIGHTS = {
    "model.layers.10.self_attn.v_proj.weight": 100,
    "model.layers.2.self_attn.q_proj.weight": 100,
    "model.layers.2.mlp.odd.weight": 100,
    "model.layers.2.self_attn.v_proj.weight": 300,
    "lm_head.weight": 400,
}
SELECTED = {
    "model.layers.10.self_attn.v_proj.weight": 40,
    "model.layers.2.self_attn.v_proj.weight": 40,
    "lm_head.weight": 20,
}


def test_shares_and_enrichment() -> None:
    description = describe_mask(make_mask(SELECTED, WEIGHTS))
    assert [row.group for row in description.components] == ["q", "v", "head", "odd"]
    assert [row.group for row in description.layers] == ["2", "10", "head"]
    values = {row.group: (row.weights, row.selected, row.share, row.enrichment) for row in description.components}
    assert values == {
        "q": (100, 0, 0.0, 0.0),
        "v": (400, 80, 0.8, pytest.approx(2.0)),
        "head": (400, 20, 0.2, pytest.approx(0.5)),
        "odd": (100, 0, 0.0, 0.0),
    }
    assert description.cells["10", "v"].enrichment == pytest.approx(4.0)
    assert ("10", "q") not in description.cells
    for rows in (description.components, description.layers, list(description.cells.values())):
        assert sum(row.weights for row in rows) == 1000
        assert sum(row.selected for row in rows) == 100
        assert sum(row.share for row in rows) == pytest.approx(1.0)


def test_the_table_is_aligned() -> None:
    mask = make_mask(SELECTED, WEIGHTS)
    lines = mask.describe().table().splitlines()
    assert lines[0] == "SafetyMask(100 of 1,000 weights (10 %) in 5 tensors, method=top)"
    assert lines[2:6] == [
        "component  weights  selected   share  enrichment",
        "q              100         0   0.0 %        0.00",
        "v              400        80  80.0 %        2.00",
        "head           400        20  20.0 %        0.50",
    ]
    assert len({len(line) for line in lines[2:7] + lines[8:]}) == 1


def test_an_empty_mask_has_no_shares(tmp_path: Path) -> None:
    description = make_mask({}, WEIGHTS).describe()
    assert all(math.isnan(row.share) and math.isnan(row.enrichment) for row in description.components)
    assert "v              400         0      –           –" in description.table()
    description.heatmap(tmp_path / "empty.png")
    assert (tmp_path / "empty.png").stat().st_size > 1000


def test_the_heatmap_is_a_picture_and_touches_no_global_state(tmp_path: Path) -> None:
    import matplotlib
    from matplotlib import pyplot

    settings, backend = dict(matplotlib.rcParams), matplotlib.get_backend()
    file = tmp_path / "folder" / "heatmap.png"
    describe_mask(make_mask(SELECTED, WEIGHTS)).heatmap(file)
    image = pyplot.imread(file)
    assert min(image.shape[:2]) > 200
    assert [entry.name for entry in file.parent.iterdir()] == ["heatmap.png"]
    assert pyplot.get_fignums() == []
    assert dict(matplotlib.rcParams) == settings
    assert matplotlib.get_backend() == backend


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real_import = builtins.__import__

    def refuse(name: str, *arguments: Any, **keywords: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(name)
        return real_import(name, *arguments, **keywords)

    description = make_mask(SELECTED, WEIGHTS).describe()
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-safety\[report\]'"):
        description.heatmap(tmp_path / "heatmap.png")
    assert list(tmp_path.iterdir()) == []


def test_components_are_the_documented_ones() -> None:
    found = {component for names in NAMES.values() for _, component in names.values()}
    assert found - {"in_proj", "score", "gate_proj"} == set(COMPONENTS)
