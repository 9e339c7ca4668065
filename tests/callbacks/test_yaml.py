# SPDX-License-Identifier: Apache-2.0
"""Every argument of the callbacks that choose weights or rehearse can be written in YAML."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from jsonargparse import ArgumentParser
from pytorch_lightning import Callback

from lightning_safety.callbacks import SafetyEnhancementTuning, SafetyPreservingAdaptation, SafetyRehearsal
from lightning_safety.monitoring import OwnReplies
from lightning_safety.scoring import LeanScoring, MixtureLayout, RefusalLikelihood
from tests.callbacks.toys import make_smallest_model, mask_of_everything

ARGUMENTS = {
    "fraction": 0.02,
    "objective": {
        "class_path": "lightning_safety.scoring.RefusalLikelihood",
        "init_args": {"examples": "borderline", "limit": 3},
    },
    "method": "bottom",
    "tokenizer": "some/folder",
    "language_model": "model.student",
    "batch_size": 4,
    "lean": {"passes": 3, "accumulate_on": "cpu", "accumulate_dtype": "bfloat16", "autocast": "bfloat16"},
    "seed": 3,
    "include": ["*.mlp.*", "*v_proj*"],
    "exclude": "*.0.*",
    "mixture": {"experts": "*.moe.experts", "routers": ["*.moe.gate"]},
    "save_mask": "mask.safetensors",
    "show_progress": False,
}


@pytest.mark.parametrize("kind", [SafetyPreservingAdaptation, SafetyEnhancementTuning])
@pytest.mark.parametrize("given", [False, True])
def test_arguments(kind: type[Callback], given: bool, tmp_path: Path) -> None:
    mask = mask_of_everything(make_smallest_model())
    mask.save(tmp_path / "mask.safetensors")
    arguments = ARGUMENTS | ({"patch": "patch.safetensors"} if kind is SafetyEnhancementTuning else {})
    if given:
        arguments = arguments | {"mask": str(tmp_path / "mask.safetensors")}
    parser = ArgumentParser()
    parser.add_argument("--callbacks", type=list[Callback])
    text = yaml.safe_dump({"callbacks": [{"class_path": f"lightning_safety.{kind.__name__}", "init_args": arguments}]})
    parsed = parser.parse_string(text)
    callback = parser.instantiate_classes(parsed).callbacks[0]
    assert type(callback) is kind
    assert isinstance(callback.choice.objective, RefusalLikelihood)
    assert callback.choice.fraction == 0.02
    assert callback.choice.include == ["*.mlp.*", "*v_proj*"]
    assert callback.choice.mixture == MixtureLayout("*.moe.experts", "*.moe.gate")
    assert callback.choice.lean == LeanScoring(3, "cpu", "bfloat16", "bfloat16")
    assert callback.method == "bottom"
    assert callback.mask == (mask if given else None)
    written = yaml.safe_load(parser.dump(parsed))["callbacks"][0]["init_args"]
    assert {name: written[name] for name in arguments if name != "objective"} == {
        name: value for name, value in arguments.items() if name != "objective"
    }


@pytest.mark.parametrize("every", [7, "adaptive"])
def test_arguments_of_a_rehearsal(every: int | str) -> None:
    arguments = {
        "every": every,
        "mode": "add",
        "objective": {
            "class_path": "lightning_safety.OwnReplies",
            "init_args": {"harmful": "mine.jsonl", "borderline": {"source": "borderline", "limit": 9}, "prompts": 5},
        },
        "weight": 0.5,
        "batch_size": 4,
        "watch_every_n_steps": 5,
        "tolerance": 0.2,
        "watch": {"source": "harmful", "limit": 9},
        "watch_prompts": 4,
        "tokenizer": "some/folder",
        "language_model": "model.student",
        "seed": 3,
    }
    parser = ArgumentParser()
    parser.add_argument("--callbacks", type=list[Callback])
    given = {"callbacks": [{"class_path": "lightning_safety.SafetyRehearsal", "init_args": arguments}]}
    parsed = parser.parse_string(yaml.safe_dump(given))
    callback = parser.instantiate_classes(parsed).callbacks[0]
    assert isinstance(callback, SafetyRehearsal)
    assert callback.every == every
    assert isinstance(callback.rehearsal.objective, OwnReplies)
    assert callback.rehearsal.objective.prompts == 5
    assert (callback.need is not None) == (every == "adaptive")
    written = yaml.safe_load(parser.dump(parsed))["callbacks"][0]["init_args"]
    assert {name: written[name] for name in arguments if name != "objective"} == {
        name: value for name, value in arguments.items() if name != "objective"
    }
