# SPDX-License-Identifier: Apache-2.0
"""Fits over quantised bases: adapters get their gradients after the sanity check, and the base stands still."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from lightning_safety.callbacks import SubspaceOverlapMonitor
from lightning_safety.callbacks.choice import WeightChoice
from lightning_safety.callbacks.together import number_of_weights
from lightning_safety.language import load_causal_lm, save_language_model
from tests.callbacks.toys import OwnModule, make_batches, make_loader, quiet
from tests.quantized import FOUR_BIT, WIDE, make_quantized_model, repacks
from tests.tiny import make_tiny_model


class Adapted(OwnModule):
    """LoRA on two kinds of layers: those below a repacked one would get no gradient."""

    def __init__(self, model: Any) -> None:
        super().__init__(get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"])).train())
        self.without_gradient: list[str] = []

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.model(input_ids=batch, labels=batch)

    def on_after_backward(self) -> None:
        weights = {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}
        self.without_gradient += [name for name, weight in weights.items() if weight.grad is None]


def fit_after_sanity_check(model: Any) -> Adapted:
    module = Adapted(model)
    loader = make_loader(make_batches(2, vocabulary=512))
    pl.Trainer(**quiet(num_sanity_val_steps=1, limit_val_batches=1)).fit(module, loader, loader)
    return module


@pytest.fixture
def folder(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    return save_language_model(make_tiny_model(**WIDE), tiny_tokenizer, tmp_path / "dense")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_all_adapters_have_gradients_after_the_sanity_check(folder: Path, quantization: Any, dtype: str) -> None:
    model = load_causal_lm(folder, quantization=quantization, dtype=dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    module = fit_after_sanity_check(model)
    assert module.without_gradient == []
    for name, value in module.model.state_dict().items():
        if "lora_" not in name:
            assert torch.equal(value, before[name.removeprefix("base_model.model.").replace(".base_layer", "")]), name


@repacks
def test_on_this_cpu_they_have_none_where_the_base_is_not_kept_unpacked() -> None:
    assert len(set(fit_after_sanity_check(make_quantized_model()).without_gradient)) >= 4


@pytest.mark.parametrize("kind", [*FOUR_BIT, "int8"])
@pytest.mark.parametrize("method", ["random", "top"])
def test_weights_of_a_quantised_base_are_chosen(
    kind: str, method: Any, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = make_quantized_model(kind)
    choice = WeightChoice(0.01, None, method, 8, 0, "*.v_proj.weight", None, False)
    mask = choice.mask(model, lambda: tiny_tokenizer, quick=True)
    assert set(mask.shapes.values()) == {(32, 64)}
    assert mask.count == 40
    mask.check_model(model)


@pytest.mark.parametrize("kind", [*FOUR_BIT, "int8"])
def test_packed_weights_are_counted_one_by_one(kind: str) -> None:
    assert number_of_weights(make_quantized_model(kind)) == number_of_weights(make_tiny_model(**WIDE))


def test_the_subspace_monitor_refuses_weights_that_stand_still(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    module = OwnModule(make_quantized_model(), tokenizer=tiny_tokenizer)
    trainer = pl.Trainer(**quiet([SubspaceOverlapMonitor()], default_root_dir=tmp_path))
    with pytest.raises(
        ValueError, match=r"`include` expected to select weights that can move but `model.* is quantised"
    ):
        trainer.fit(module, make_loader(make_batches(2, vocabulary=512)))
