# SPDX-License-Identifier: Apache-2.0
"""The per-expert pattern of a mask: shares, unscored experts, load, tables, and what a file keeps of it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from lightning_safety.scoring import (
    MixtureLayout,
    RefusalMargin,
    RouterLoad,
    SafetyMask,
    describe_mask,
    expected_safety_impact,
    measure_router_load,
    select_random,
    select_top,
)
from lightning_safety.scoring.unscored import UNSCORED
from tests.scoring.mixtures import make_mixture, starve, with_single_experts

MODULE = "model.layers.3.mlp.experts"
NAN = torch.full((2, 2), math.nan)
SCORES = {
    "model.layers.3.self_attn.v_proj.weight": torch.zeros(4),
    f"{MODULE}.gate_up_proj": torch.stack([torch.ones(2, 2), NAN, torch.zeros(2, 2)]),
    f"{MODULE}.down_proj": torch.stack([torch.full((2, 2), 2.0), NAN, torch.tensor([[3.0, 0.0], [0.0, 0.0]])]),
}
LOAD = RouterLoad(8, {MODULE: {"0": 1.0, "1": 0.0, "2": 1.0}})


def test_shares_by_expert() -> None:
    experts = describe_mask(select_top(SCORES, 0.3)).experts
    assert [(one.group, one.layer, one.module, one.expert) for one in experts] == [
        (f"3/{number}", "3", MODULE, str(number)) for number in range(3)
    ]
    assert [(one.weights, one.selected, one.scored) for one in experts] == [(8, 5, True), (0, 0, False), (8, 1, True)]
    assert [one.share for one in experts] == [pytest.approx(share) for share in (5 / 6, 0, 1 / 6)]
    assert [one.enrichment for one in experts[::2]] == [pytest.approx(5 / 6 * 20 / 8), pytest.approx(1 / 6 * 20 / 8)]
    assert math.isnan(experts[1].enrichment)


def test_groups_count_what_was_scored() -> None:
    description = describe_mask(select_top(SCORES, 0.3))
    assert {row.group: row.weights for row in description.components} == {"v": 4, "expert": 16}
    (layer,) = description.layers
    assert (layer.weights, layer.selected, layer.enrichment) == (20, 6, 1.0)


def test_the_table_of_few_experts() -> None:
    description = select_top(SCORES, 0.3).describe(LOAD)
    assert description.mask == "SafetyMask(6 of 20 weights (30 %) in 3 tensors, 8 unscored, method=top)"
    assert description.table().endswith(
        "layer/expert   weights  selected   share  enrichment     load\n"
        "3/0                  8         5  83.3 %        2.08  100.0 %\n"
        "3/1           unscored         –       –           –    0.0 %\n"
        "3/2                  8         1  16.7 %        0.42  100.0 %"
    )
    assert "load" not in select_top(SCORES, 0.3).describe().table()


def test_the_tables_of_many_experts() -> None:
    scores, shares = {}, {}
    for layer in range(60):
        score = torch.zeros(128, 2, 2)
        score[:layer] = math.nan
        score[100] = 1 + layer
        scores[f"model.layers.{layer}.mlp.experts.down_proj"] = score
        shares[f"model.layers.{layer}.mlp.experts"] = {str(number): number / 127 for number in range(128)}
    mask = select_top(scores, 0.005)
    description = mask.describe(RouterLoad(5, shares))
    lines = description.expert_table().splitlines()
    assert len(description.experts) == 60 * 128
    assert len(lines) == 61 + 1 + 11
    assert lines[0].split()[2:] == ["unscored", "min", "enrichment", "median", "max", "min", "load", "median", "max"]
    assert lines[60].split() == ["59", "128", "59", "0.00", "0.00", "200.34", "0.0", "%", "50.0", "%", "100.0", "%"]
    assert lines[62].split() == ["most", "enriched", "weights", "selected", "share", "enrichment", "load"]
    # The highest scores are those of the last layers; of equal shares the earlier layer comes first.
    assert [line.split()[:5] for line in lines[63:]] == [
        [f"{layer}/100", "4", "4", "3.4", "%"] for layer in range(31, 41)
    ]


def test_a_dense_mask_has_no_experts() -> None:
    description = select_top({"model.layers.0.self_attn.q_proj.weight": torch.ones(4)}, 0.5).describe()
    assert description.experts == []
    assert description.expert_table() == ""
    assert description.table().endswith("1.00")


def test_load_of_another_model_is_refused() -> None:
    mask = select_top(SCORES, 0.3)
    for shares, found in (({}, "none"), ({MODULE: {"0": 1.0}}, "1")):
        with pytest.raises(ValueError, match=rf"of the 3 experts of `{MODULE}` it has {found}\. "):
            mask.describe(RouterLoad(8, shares))


def test_two_sets_of_experts_in_a_layer_are_told_apart() -> None:
    mask = select_top({f"layers.0.{part}.experts.w": torch.ones(2, 2, 2) for part in ("mlp", "attention")}, 0.5)
    groups = [one.group for one in mask.describe().experts]
    assert groups == ["layers.0.mlp.experts/0", "layers.0.mlp.experts/1",
                      "layers.0.attention.experts/0", "layers.0.attention.experts/1"]  # fmt: skip


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe"])
def test_the_pattern_of_a_model(family: str, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model, objective = make_mixture(family), RefusalMargin(limit=6)
    starve(model, 3)
    scores = expected_safety_impact(model, objective, tiny_tokenizer)
    select_top(scores, 0.1).save(tmp_path / "mask.safetensors")
    mask = SafetyMask.load(tmp_path / "mask.safetensors")
    experts = mask.describe(measure_router_load(model, objective, tiny_tokenizer)).experts
    assert [one.group for one in experts] == [f"{layer}/{expert}" for layer in (0, 1) for expert in range(5)]
    assert [one.expert for one in experts if not one.scored] == ["3", "3"]
    for one in experts:
        parts = [scores[f"{one.module}.{name}"][int(one.expert)] for name in ("gate_up_proj", "down_proj")]
        chosen = [mask.indices[f"{one.module}.{name}"].long() for name in ("gate_up_proj", "down_proj")]
        selected = sum(
            int((index // part.numel() == int(one.expert)).sum()) for part, index in zip(parts, chosen, strict=True)
        )
        assert one.selected == selected
        assert one.weights == (sum(part.numel() for part in parts) if one.scored else 0)
        assert (one.load == 0) == (not one.scored)
    assert mask.describe().table().count("unscored") == 3


def test_patterns_in_the_metadata_find_experts_of_any_name(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = with_single_experts(make_mixture("mixtral"), "specialists", "switch")
    layout = MixtureLayout("*.mlp.specialists", "*.mlp.switch")
    starve(model, 1)
    scores = expected_safety_impact(model, RefusalMargin(limit=6), tiny_tokenizer, mixture=layout)
    description = select_top(scores, 0.1, metadata=layout.describe()).describe()
    assert len(description.experts) == 10
    assert [one.group for one in description.experts if not one.scored] == ["0/1", "1/1"]
    assert "expert" in [row.group for row in description.components]
    assert select_top(scores, 0.1).describe().experts == []
    both = select_top(scores, 0.1, metadata=layout.describe()) - select_random(scores, 0.1, seed=0)
    assert [one.group for one in both.describe().experts if not one.scored] == ["0/1", "1/1"]
    with pytest.raises(ValueError, match="`metadata` expected to hold a JSON list of patterns under 'experts'"):
        select_top(scores, 0.1, metadata={"experts": "all"}).describe()


# What a mask keeps ----------------------------------------------------------------------------------------------------


def test_a_mask_keeps_what_was_not_scored(tmp_path: Path) -> None:
    mask = select_top(SCORES, 0.3)
    mask.save(tmp_path / "mask.safetensors")
    for kept in (SafetyMask.load(tmp_path / "mask.safetensors"), SafetyMask.from_state_dict(mask.state_dict())):
        assert kept == mask
        assert kept.unscored == {f"{MODULE}.gate_up_proj": {1: 4}, f"{MODULE}.down_proj": {1: 4}}
        assert (kept.scored, kept.fraction) == (20, 0.3)


def test_a_weight_counts_as_scored_where_either_mask_scored_it() -> None:
    first = select_top(SCORES, 0.3)
    everything = {name: score.nan_to_num() for name, score in SCORES.items()}
    second = select_random({**SCORES, f"{MODULE}.down_proj": everything[f"{MODULE}.down_proj"]}, 0.3, seed=0)
    assert (first & first).scored == 20
    assert (first | second).unscored == {f"{MODULE}.gate_up_proj": {1: 4}}
    assert (first - select_top(everything, 0.3)).scored == 28


@pytest.mark.parametrize(
    "entry",
    [
        "nonsense",
        "[1]",
        '{"other": 1}',
        '{"a": 0}',
        '{"a": 9}',
        '{"a": {"0": 1}}',
        '{"b": 1}',
        '{"b": {"2": 1}}',
        '{"b": {"0": 5}}',
    ],
)
def test_counts_that_do_not_fit_are_refused(entry: str) -> None:
    empty: dict[str, Any] = {"a": torch.empty(0, dtype=torch.int32), "b": torch.empty(0, dtype=torch.int32)}
    with pytest.raises(ValueError, match="`metadata` expected to count unscored weights"):
        SafetyMask(empty, {"a": (4,), "b": (2, 2, 2)}, {UNSCORED: entry})


def test_the_file_of_a_large_mixture_stays_small(tmp_path: Path) -> None:
    """Sixty layers of 128 experts, three of four not reached, one selected weight in each tensor."""
    names = [
        f"model.layers.{layer}.mlp.experts.{part}" for layer in range(60) for part in ("gate_up_proj", "down_proj")
    ]
    counts = {name: {str(number): 2048 * 768 for number in range(96)} for name in names}
    mask = SafetyMask(
        {name: torch.tensor([2048 * 768 * 128 - 1]) for name in names},
        dict.fromkeys(names, (128, 2048, 768)),
        {UNSCORED: json.dumps(counts)},
    )
    mask.save(tmp_path / "mask.safetensors")
    assert (tmp_path / "mask.safetensors").stat().st_size < 500_000
    assert SafetyMask.load(tmp_path / "mask.safetensors").scored == 120 * 32 * 2048 * 768
