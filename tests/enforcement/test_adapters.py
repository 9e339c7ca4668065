# SPDX-License-Identifier: Apache-2.0
"""Which adapters can be held, and what is said of the others."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch

from lightning_safety.enforcement.adapters import adapter_rows, has_adapters, selected_adapted_layers
from lightning_safety.enforcement.held_lora import HeldLora
from lightning_safety.scoring import SafetyMask, select_random
from tests.enforcement.adapters import make_adapted_model, make_mask, train_adapters
from tests.tiny import make_tiny_model

UP = "model.layers.0.mlp.up_proj.weight"


def test_whether_a_model_has_adapters() -> None:
    assert has_adapters(make_adapted_model())
    assert not has_adapters(make_tiny_model())


def test_only_adapted_layers_with_selected_weights_are_returned() -> None:
    model = make_adapted_model(target_modules=["q_proj", "up_proj"])
    shapes = {
        UP: (64, 32),
        "model.layers.1.mlp.up_proj.weight": (64, 32),
        "model.layers.0.mlp.down_proj.weight": (32, 64),
    }
    places = [torch.tensor([5]), torch.tensor([], dtype=torch.int32), torch.tensor([7])]
    mask = SafetyMask(dict(zip(shapes, places, strict=True)), shapes)
    layers = selected_adapted_layers(model, mask)
    assert [adapted.name for adapted in layers] == [UP]
    assert layers[0].adapters == ["default"]
    assert layers[0].shape == (64, 32)


def test_a_mask_that_matches_no_adapted_layer_is_an_error() -> None:
    """The published code filters by base names, which no adapter has, and protects nothing without a word."""
    model = make_adapted_model(target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"selects none there: .* `model\.layers\.0\.mlp\.up_proj\.weight`"):
        HeldLora(make_mask(model, include="*up_proj*")).attach(model)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (peft.LoraConfig(target_modules=["up_proj"], use_dora=True), "DoRA"),
        (peft.LoHaConfig(target_modules=["up_proj"]), "loha"),
        (peft.IA3Config(target_modules=["up_proj"], feedforward_modules=[]), "ia3"),
        (peft.VeraConfig(target_modules=["up_proj"]), "vera"),
        (peft.OFTConfig(target_modules=["up_proj"], oft_block_size=8, r=0), "oft"),
        (peft.AdaLoraConfig(target_modules=["up_proj"], total_step=10), "adalora"),
    ],
)
def test_other_kinds_of_adapters_are_refused_by_name(config: Any, name: str) -> None:
    model = peft.get_peft_model(make_tiny_model(), config)
    with pytest.raises(ValueError, match=f"(?i)expected to have LoRA adapters that can be held .*{name}"):
        HeldLora(make_mask(model, include="*up_proj*")).attach(model)


def test_lora_on_a_bare_parameter_is_refused_by_name() -> None:
    config = peft.LoraConfig(target_parameters=["mlp.up_proj.weight"], target_modules=[])
    model = peft.get_peft_model(make_tiny_model(), config)
    with pytest.raises(ValueError, match="ParamWrapper"):
        HeldLora(SafetyMask({UP: torch.tensor([0])}, {UP: (64, 32)})).attach(model)


@pytest.mark.parametrize("initialisation", ["pissa", "olora", "orthogonal", False])
def test_an_initialisation_that_starts_elsewhere_is_named(initialisation: Any) -> None:
    model = make_adapted_model(init_lora_weights=initialisation)
    with pytest.raises(ValueError, match=rf"add nothing.*init_lora_weights={initialisation!r}"):
        HeldLora(make_mask(model)).attach(model)


def test_a_trained_adapter_is_refused_unless_it_was_held() -> None:
    model = make_adapted_model()
    mask = make_mask(model)
    train_adapters(model)
    with pytest.raises(ValueError, match="expected to add nothing to"):
        HeldLora(mask).attach(model)
    assert HeldLora(mask).attach(model, continued=True).layers == 14


def test_a_merged_adapter_is_refused() -> None:
    model = make_adapted_model(trained=True)
    mask = make_mask(model)
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"\['default'\] are merged into it"):
        HeldLora(mask).attach(model, continued=True)


def test_whole_neurons_are_rows_of_b() -> None:
    model = make_adapted_model()
    rows = torch.tensor([3, 9])
    whole = SafetyMask({UP: (rows[:, None] * 32 + torch.arange(32)).view(-1)}, {UP: (64, 32)})
    found = adapter_rows(model, whole)
    name = "model.layers.0.mlp.up_proj.lora_B.default.weight"
    assert found.indices[name].tolist() == [12, 13, 14, 15, 36, 37, 38, 39]
    assert found.shapes == {name: (64, 4)}


def test_parts_of_neurons_are_refused() -> None:
    part = select_random({UP: torch.empty(64, 32)}, 0.1, 0)
    with pytest.raises(ValueError, match=r"whole neurons .* selects parts of \d+ rows"):
        adapter_rows(make_adapted_model(), part)


def test_neurons_of_a_begun_adapter_are_refused_where_b_is_not_zero() -> None:
    model = make_adapted_model(init_lora_weights="olora")
    whole = SafetyMask({UP: torch.arange(32)}, {UP: (64, 32)})
    with pytest.raises(ValueError, match=r"init_lora_weights='olora'"):
        adapter_rows(model, whole)
