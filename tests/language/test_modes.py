# SPDX-License-Identifier: Apache-2.0
"""Evaluation mode comes and goes without a trace."""

from __future__ import annotations

import pytest
from torch import nn

from lightning_safety.language import evaluation_mode


def flags(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


@pytest.mark.parametrize("fails", [False, True])
def test_every_submodule_comes_back_in_its_own_mode(tiny_model, fails):
    tiny_model.train()
    tiny_model.model.layers[0].eval()
    tiny_model.model.layers[1].mlp.eval()
    before = flags(tiny_model)
    assert len(set(before)) == 2
    try:
        with evaluation_mode(tiny_model):
            assert not any(flags(tiny_model))
            assert not fails or 1 / 0
    except ZeroDivisionError:
        pass
    assert flags(tiny_model) == before


def test_a_root_in_evaluation_mode_does_not_hide_what_trains_below(tiny_model):
    tiny_model.eval()
    tiny_model.model.train()
    before = flags(tiny_model)
    with evaluation_mode(tiny_model):
        assert not any(flags(tiny_model))
    assert flags(tiny_model) == before


@pytest.mark.parametrize("inside", [None, True, False])
@pytest.mark.parametrize("before", [True, False])
def test_the_cache_setting_comes_back(tiny_model, before, inside):
    tiny_model.config.use_cache = before
    with evaluation_mode(tiny_model, use_cache=inside):
        assert tiny_model.config.use_cache is (before if inside is None else inside)
        tiny_model.config.use_cache = not before
    assert tiny_model.config.use_cache is before


def test_a_model_without_a_config_gets_none():
    model = nn.Linear(2, 2)
    with evaluation_mode(model, use_cache=True):
        assert not model.training
    assert not hasattr(model, "config")
