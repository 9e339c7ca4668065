# SPDX-License-Identifier: Apache-2.0
"""Mixtures of experts under the callbacks: chosen weights hold or train, routers are free, unscored experts too."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from lightning_safety.callbacks import SafetyEnhancementTuning, SafetyPreservingAdaptation, SubspaceOverlapMonitor
from lightning_safety.callbacks.selected import SelectedWeightsCallback
from lightning_safety.scoring import MixtureLayout, RefusalMargin, expected_safety_impact, select_top
from tests.callbacks.toys import BOTH, OwnModule, assert_only_selected_moved, chosen, fit, moved, weights_of
from tests.scoring.mixtures import make_mixture, routers_of, starve, with_single_experts

OBJECTIVE = RefusalMargin(limit=6)
LAYOUT = MixtureLayout("*.mlp.specialists", "*.mlp.switch")


def own_model() -> Any:
    model = with_single_experts(make_mixture("mixtral"), "specialists", "switch")
    model.config.model_type = "own_moe"
    return model


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe"])
def test_held_weights_of_experts_do_not_move(
    family: str, tiny_tokenizer: PreTrainedTokenizerFast, capfd: pytest.CaptureFixture[str], caplog: Any
) -> None:
    model = make_mixture(family)
    starve(model, 3)
    scores = expected_safety_impact(model, OBJECTIVE, tiny_tokenizer)
    before = weights_of(model)
    callback = SafetyPreservingAdaptation(fraction=0.2, objective=OBJECTIVE)
    module = OwnModule(model.train(), tokenizer=tiny_tokenizer)
    caplog.set_level("INFO")
    fit(module, [callback], steps=24)
    assert module.steps == [24]
    mask = callback.mask
    assert mask is not None
    assert mask == select_top(scores, 0.2)
    assert mask.unscored == select_top(scores, 0.2).unscored
    assert not set(mask.shapes) & set(routers_of(model))
    for name, change in moved(model, before).items():
        held = chosen(mask, name, change.numel())
        assert not change[held].any(), name
        assert change[~held].float().mean() > 0.9, name
        if ".experts." in name:
            assert not held.view(5, -1)[3].any(), name
    assert sum(index.numel() for name, index in mask.indices.items() if ".experts." in name) > 50
    said = capfd.readouterr().err + caplog.text
    assert re.search(r"; 2 of 10 experts unscored, enrichment \d+\.\d\d in [01]/[0124], ", said)


def test_trained_weights_of_experts_are_the_only_ones_that_move(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_mixture("qwen3_moe")
    before = weights_of(model)
    callback = SafetyEnhancementTuning(fraction=0.05, objective=OBJECTIVE)
    fit(OwnModule(model.train(), tokenizer=tiny_tokenizer), [callback], steps=20)
    assert callback.mask is not None
    assert_only_selected_moved(model, before, callback.mask)
    experts = {name: index for name, index in callback.mask.indices.items() if ".experts." in name}
    assert sum(index.numel() for index in experts.values()) > 0


@BOTH
@pytest.mark.parametrize("method", ["top", "random"])
def test_patterns_reach_the_choice(
    kind: type[SelectedWeightsCallback], method: Any, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    module = OwnModule(own_model().train(), tokenizer=tiny_tokenizer)
    with pytest.raises(ValueError, match=r"'own_moe'.*seems to have experts"):
        fit(module, [kind(fraction=0.05, objective=OBJECTIVE, method=method)])
    callback = kind(fraction=0.05, objective=OBJECTIVE, method=method, mixture=LAYOUT)
    fit(module, [callback])
    assert callback.mask is not None
    assert not any("switch" in name for name in callback.mask.shapes)
    described = callback.mask.describe()
    assert len(described.experts) == 10
    # A random choice scores nothing, so everything is a candidate.
    assert (callback.mask.unscored == {}) or method == "top"


@BOTH
def test_something_else_than_patterns_is_refused(kind: Any) -> None:
    with pytest.raises(TypeError, match="`mixture` expected to be a MixtureLayout but got dict"):
        kind(objective=OBJECTIVE, mixture={"experts": "*"})


def test_subspaces_of_experts_are_watched(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    module = OwnModule(own_model().train(), tokenizer=tiny_tokenizer)
    monitor = SubspaceOverlapMonitor(
        every_n_steps=2, reference=OBJECTIVE, watch_utility=False, figures=False, mixture=LAYOUT, include="*.down*"
    )
    with pytest.raises(ValueError, match="include"):
        fit(module, [monitor], steps=2, default_root_dir=tmp_path)
    monitor = SubspaceOverlapMonitor(
        every_n_steps=2, reference=OBJECTIVE, watch_utility=False, figures=False, mixture=LAYOUT, include="*.w2.weight"
    )
    trainer = fit(module, [monitor], steps=2, default_root_dir=tmp_path)
    assert 0 <= float(trainer.callback_metrics["safety/subspace_overlap"]) <= 1
    assert torch.isfinite(trainer.callback_metrics["safety/update_norm"])
