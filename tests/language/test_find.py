# SPDX-License-Identifier: Apache-2.0
"""Finding the language model wherever it is, and names that do not depend on it."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn

from lightning_safety.language import canonical_name, find_language_model, named_weights
from tests.tiny import make_tiny_model


class Holder(nn.Module):
    """Any module of a user's, with attributes of any name."""

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)


class Forwarding(Holder):
    """As a LightningModule that offers its model's methods."""

    def training_step(self, batch: object) -> None: ...

    def generate(self) -> None: ...

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: model,
        lambda model: Holder(model=model),
        lambda model: Holder(other=nn.Linear(2, 2), system=Holder(inner=nn.ModuleList([nn.ReLU(), model]))),
        lambda model: Forwarding(model=model),
        torch.compile,
        lambda model: Holder(network=torch.compile(model)),
        lambda model: torch.compile(Holder(network=model)),
        nn.DataParallel,
        lambda model: Holder(module=model),
        lambda model: Holder(first=model, second=model),
        lambda model: Holder(plain=model, compiled=torch.compile(model)),
    ],
)
def test_the_model_is_found_without_its_wrappers(tiny_model, wrap):
    assert find_language_model(wrap(tiny_model)) is tiny_model


def test_the_model_is_found_in_a_distributed_wrapper(tiny_model, process_group):
    wrapped = torch.compile(nn.parallel.DistributedDataParallel(tiny_model))
    assert find_language_model(wrapped) is tiny_model
    assert find_language_model(Holder(model=wrapped), "model") is tiny_model
    assert list(named_weights(wrapped)) == list(named_weights(tiny_model))


@pytest.mark.parametrize("wrap", [lambda model: model, torch.compile, lambda model: Holder(model=model)])
def test_under_lora_the_causal_model_with_bare_names_is_found(tiny_model, wrap):
    names = list(named_weights(tiny_model))
    adapted = get_peft_model(tiny_model, LoraConfig(target_modules=["q_proj"]))
    found = find_language_model(wrap(adapted))
    assert found is tiny_model
    weights = named_weights(found)
    assert [name for name in weights if "lora_" not in name] == names
    assert "model.layers.0.self_attn.q_proj.lora_A.default.weight" in weights
    assert list(named_weights(adapted)) == list(weights)


def test_adapters_outside_of_the_base_model_are_refused(tiny_model):
    adapted = get_peft_model(tiny_model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="prompt-learning adapter PromptTuningConfig"):
        find_language_model(adapted)


def test_several_models_are_listed_and_one_can_be_named(tiny_model):
    reference = make_tiny_model(seed=1)
    module = Holder(policy=tiny_model, frozen=Holder(reference=reference))
    message = "found 2: `policy` (LlamaForCausalLM, 34,976 weights), `frozen.reference` (LlamaForCausalLM"
    with pytest.raises(ValueError, match=re.escape(message) + ".*" + re.escape('`language_model="policy"`')):
        find_language_model(module)
    assert find_language_model(module, "frozen.reference") is reference
    assert find_language_model(module, "frozen") is reference


@pytest.mark.parametrize("name", ["network", "network._orig_mod", "network.model", "network.model.layers"])
def test_a_name_may_leave_out_wrappers_and_lead_to_a_part(tiny_model, name):
    module = Holder(network=torch.compile(tiny_model))
    if name.startswith("network.model"):
        with pytest.raises(ValueError, match=rf"expected in Holder at '{name}' but found none among"):
            find_language_model(module, name)
    else:
        assert find_language_model(module, name) is tiny_model


def test_a_name_leads_through_a_compiled_module(tiny_model):
    module = torch.compile(Holder(system=torch.compile(Holder(model=tiny_model))))
    assert find_language_model(module, "system.model") is tiny_model


def test_of_two_models_the_one_that_contains_the_other_is_meant(tiny_model):
    draft = make_tiny_model(seed=1)
    tiny_model.draft = draft
    module = Holder(model=tiny_model)
    assert find_language_model(module) is tiny_model
    assert find_language_model(module, "model.draft") is draft


def test_a_wrong_name_lists_the_closest(tiny_model):
    module = Holder(policy=tiny_model, critic=nn.Linear(2, 2))
    with pytest.raises(ValueError, match=re.escape("'polcy': Holder has no module 'polcy'. Did you mean `policy`?")):
        find_language_model(module, "polcy")
    with pytest.raises(ValueError, match=r"Holder\.policy has no module 'modle'. Did you mean `model`"):
        find_language_model(module, "policy.modle")


def test_an_absent_model_lists_what_there_is():
    module = Holder(encoder=nn.Linear(2, 2), **{f"layer{index}": nn.ReLU() for index in range(20)})
    with pytest.raises(ValueError, match=r"none among: encoder \(Linear\), layer0 \(ReLU\), .*, … \(9 more\)"):
        find_language_model(module)
    with pytest.raises(ValueError, match="none among: ReLU without submodules"):
        find_language_model(nn.ReLU())


def test_a_model_without_a_head_is_no_causal_model(tiny_model):
    with pytest.raises(ValueError, match="none among"):
        find_language_model(tiny_model.model)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.0.mlp.weight", "model.layers.0.mlp.weight"),
        ("_orig_mod.lm_head.weight", "lm_head.weight"),
        ("module._orig_mod.module.lm_head.weight", "lm_head.weight"),
        ("_orig_mod.module.base_model.model.model.embed.weight", "model.embed.weight"),
        ("base_model.model._orig_mod.lm_head.base_layer.weight", "lm_head.weight"),
        ("model.layers.3._orig_mod.mlp.base_layer.base_layer.weight", "model.layers.3.mlp.weight"),
        ("model.submodule.my_base_layer.weight", "model.submodule.my_base_layer.weight"),
        ("model.module.weight", "model.module.weight"),
        ("model.base_model.model.weight", "model.base_model.model.weight"),
        ("base_model.encoder.weight", "base_model.encoder.weight"),
        ("module", "module"),
        ("weight", "weight"),
    ],
)
def test_canonical_name(name, expected):
    assert canonical_name(name) == expected


WRAPPERS = st.lists(st.sampled_from(["_orig_mod", "module", "base_model.model"]), max_size=5)


@given(wrappers=WRAPPERS, ending=st.sampled_from(["", ".base_layer", "._orig_mod", ".base_layer.base_layer"]))
def test_any_nesting_of_wrappers_leaves_the_bare_name(wrappers, ending):
    name = ".".join([*wrappers, f"model.layers.0.q_proj{ending}.weight"])
    assert canonical_name(name) == "model.layers.0.q_proj.weight"
    assert canonical_name(canonical_name(name)) == canonical_name(name)


def test_named_weights_hold_the_parameters_in_order(tiny_model):
    weights = named_weights(torch.compile(tiny_model))
    assert list(weights) == [name for name, _ in tiny_model.named_parameters()]
    assert all(weights[name] is parameter for name, parameter in tiny_model.named_parameters())
    assert "lm_head.weight" not in weights


def test_two_parameters_of_one_name_are_refused():
    module = Holder(_orig_mod=nn.Linear(2, 2), module=nn.Linear(2, 2))
    with pytest.raises(ValueError, match=re.escape("one parameter named 'weight' but 'module.weight' is a second one")):
        named_weights(module)


def test_of_a_module_that_peft_trains_whole_the_copy_in_use_is_named():
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    adapted = get_peft_model(make_tiny_model(tie_word_embeddings=False), config)
    weights = named_weights(find_language_model(adapted))
    head = adapted.get_base_model().lm_head
    assert weights["lm_head.weight"] is head.modules_to_save["default"].weight
    assert [name for name in weights if "lm_head" in name] == ["lm_head.weight"]
