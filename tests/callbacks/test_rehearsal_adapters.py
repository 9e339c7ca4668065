# SPDX-License-Identifier: Apache-2.0
"""Rehearsal trains what is trainable and nothing else: adapters, over quantised bases too, and selected weights."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import nn

from lightning_safety.callbacks import (
    SafetyEnhancementTuning,
    SafetyPreservingAdaptation,
    SafetyRehearsal,
    rehearsal_need,
)
from lightning_safety.enforcement import merge_held_adapter
from lightning_safety.monitoring import own_replies
from lightning_safety.scoring import RefusalLikelihood
from tests.callbacks.toys import (
    OwnModule,
    assert_held,
    assert_only_selected_moved,
    fit,
    make_smallest_model,
    mask_of_everything,
    weights_of,
)
from tests.enforcement.adapters import make_adapted_model, make_mask
from tests.enforcement.objectives import TokenRows
from tests.quantized import make_quantized_model
from tests.tiny import make_tiny_tokenizer

TOKENIZER = make_tiny_tokenizer()


def sgd(weights: list[nn.Parameter]) -> list[torch.optim.Optimizer]:
    return [torch.optim.SGD(weights, lr=0.2, momentum=0.9)]


def rehearsal(**options: Any) -> SafetyRehearsal:
    settings = {"every": 1, "objective": RefusalLikelihood(limit=4), "tokenizer": TOKENIZER, "weight": 10.0, **options}
    return SafetyRehearsal(**settings)


def adapters_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters() if "lora_" in name}


@pytest.mark.parametrize("kind", ["none", "nf4-double", "int8"])
@pytest.mark.parametrize("every", [1, "adaptive"])
def test_of_adapters_it_trains_the_adapters(kind: str, every: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The looks of the adaptive way are what repacks 4-bit weights on some CPUs, after which gradients are missing."""
    monkeypatch.setattr(own_replies, "generate_replies", lambda *arguments, **_: ["I can't help."] * len(arguments[2]))
    look = rehearsal_need.opening_likelihood
    looks: list[float | None] = []

    def falling(*arguments: Any, **options: Any) -> float:
        looks.append(look(*arguments, **options))
        return -len(looks)

    monkeypatch.setattr(rehearsal_need, "opening_likelihood", falling)

    def fitted(*callbacks: Any) -> nn.Module:
        torch.manual_seed(0)
        configuration = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        if kind == "none":
            model: Any = make_adapted_model()
        else:
            model = peft.get_peft_model(make_quantized_model(kind), configuration).train()
        fit(OwnModule(model, sgd), callbacks, steps=4)
        return model

    callback = rehearsal(every=every, watch_every_n_steps=1, tolerance=0.0, watch_prompts=2)
    model, plain = fitted(callback), fitted()
    assert callback._rehearsals == (4 if every == 1 else 2)
    assert len(looks) == (0 if every == 1 else 3)
    learned, without = adapters_of(model), adapters_of(plain)
    assert all(not torch.equal(learned[name], without[name]) for name in learned)
    weights = dict(plain.named_parameters())
    for name, weight in model.named_parameters():
        if "lora_" not in name:
            assert torch.equal(weight, weights[name]), name


def test_what_is_held_under_adapters_stays_held() -> None:
    model = make_adapted_model()
    mask, before = make_mask(model), weights_of(make_adapted_model().unload())
    fit(OwnModule(model), [rehearsal(), SafetyPreservingAdaptation(mask=mask)], steps=6)
    assert_held(merge_held_adapter(model, mask), before, mask, trained=list(mask.indices))


def test_of_selected_weights_it_trains_these_alone() -> None:
    model = make_smallest_model()
    mask, before = mask_of_everything(model), weights_of(model)
    fit(OwnModule(model), [rehearsal(objective=TokenRows(), every=2), SafetyEnhancementTuning(mask=mask)])
    assert_only_selected_moved(model, before, mask)
    other = make_smallest_model()
    fit(OwnModule(other), [SafetyEnhancementTuning(mask=mask)])
    assert any(not torch.equal(weight, weights_of(other)[name]) for name, weight in weights_of(model).items())


def test_of_a_frozen_base_it_trains_the_selected_weights() -> None:
    model = make_adapted_model()
    before, adapters = weights_of(make_adapted_model().unload()), adapters_of(model)
    mask = make_mask(model)
    module = OwnModule(model)
    fit(module, [SafetyEnhancementTuning(mask=mask), rehearsal()], steps=3)
    assert all(torch.equal(weight, adapters[name]) for name, weight in adapters_of(model).items())
    assert_only_selected_moved(model.unload(), before, mask)
