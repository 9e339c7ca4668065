# SPDX-License-Identifier: Apache-2.0
"""Loading quantised: the same from a folder, a stored quantised folder and a GGUF file, ready for adapters."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from transformers import PreTrainedTokenizerFast

from lightning_safety.language import (
    BUNDLED_MODEL,
    keep_unpacked,
    load_causal_lm,
    quantized_layers,
    save_language_model,
)
from lightning_safety.language.quantization import quantize
from tests.quantized import WIDE, make_quantized_model, same_bits
from tests.tiny import make_tiny_model

IDS = torch.arange(5, 21).view(2, 8)


@pytest.fixture
def folder(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    return save_language_model(make_tiny_model(**WIDE), tiny_tokenizer, tmp_path / "dense")


def assert_same(model: Any, other: Any) -> None:
    one, two = model.state_dict(), other.state_dict()
    assert list(one) == list(two)
    assert all(same_bits(value, two[name]) for name, value in one.items())
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, other(input_ids=IDS).logits)


@pytest.mark.parametrize(("quantization", "layer"), [("nf4", Linear4bit), ("int8", Linear8bitLt)])
def test_linear_layers_are_quantised_and_nothing_else(folder: Path, quantization: Any, layer: type) -> None:
    model = load_causal_lm(folder, quantization=quantization)
    assert {type(module) for _, module in quantized_layers(model)} == {layer}
    assert len(list(quantized_layers(model))) == 14
    assert type(model.lm_head) is torch.nn.Linear
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not model.training
    assert model.name_or_path == str(folder)
    assert {weight.device.type for weight in model.parameters()} == {"cpu"}
    expected = make_quantized_model("nf4-double" if quantization == "nf4" else "int8")
    keep_unpacked(expected)
    assert_same(model, expected)


def test_four_bit_means_double_quantised_normal_float(folder: Path) -> None:
    state = load_causal_lm(folder, quantization="nf4").model.layers[0].mlp.up_proj.weight.quant_state
    assert state.quant_type == "nf4"
    assert state.nested


@pytest.mark.parametrize("dtype", [None, "bfloat16", torch.float16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_four_bits_compute_in_the_dtype_of_the_model(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, stored: torch.dtype, dtype: Any
) -> None:
    save_language_model(make_tiny_model(**WIDE).to(stored), tiny_tokenizer, tmp_path / "model")
    model = load_causal_lm(tmp_path / "model", dtype=dtype, quantization="nf4")
    expected = {None: stored, "bfloat16": torch.bfloat16, torch.float16: torch.float16}[dtype]
    assert {layer.compute_dtype for _, layer in quantized_layers(model)} == {expected}
    assert model.config.quantization_config.bnb_4bit_compute_dtype == expected
    assert model.dtype == model.model.norm.weight.dtype == expected


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantised_model_is_saved_and_loaded_as_it_is(
    folder: Path, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, quantization: Any
) -> None:
    model = load_causal_lm(folder, quantization=quantization)
    with torch.no_grad():
        model(input_ids=IDS)
    stored = save_language_model(model, tiny_tokenizer, tmp_path / "stored")
    again = load_causal_lm(stored)
    assert_same(again, model)
    for asked in ("nf4", "int8"):
        with pytest.raises(ValueError, match=rf"stored quantised \(by bitsandbytes\) but got '{asked}'. Leave it out"):
            load_causal_lm(stored, quantization=asked)  # type: ignore[arg-type]


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_loaded_model_is_quantised_as_if_it_had_been_saved(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, stored: torch.dtype, quantization: Any
) -> None:
    dense = make_tiny_model(**WIDE).to(stored)
    dense.generation_config.max_new_tokens = 7
    save_language_model(dense, tiny_tokenizer, tmp_path / "model")
    expected = load_causal_lm(tmp_path / "model", quantization=quantization)
    found = quantize(dense, quantization)
    keep_unpacked(found)
    if quantization == "nf4":
        for _, layer in quantized_layers(found):
            layer.compute_dtype = stored
    assert_same(found, expected)
    assert found.lm_head.weight is found.model.embed_tokens.weight
    assert found.generation_config.max_new_tokens == 7
    assert not list(quantized_layers(dense))


def test_the_bundled_model_is_quantised() -> None:
    model = load_causal_lm(BUNDLED_MODEL, dtype="bfloat16", quantization="nf4")
    assert len(list(quantized_layers(model))) == 210
    assert model.name_or_path == BUNDLED_MODEL
    assert {layer.compute_dtype for _, layer in quantized_layers(model)} == {torch.bfloat16}
    assert {layer.support_avx512bf16_for_cpu for _, layer in quantized_layers(model)} == {False}
    assert sum(weight.nbytes for weight in model.parameters()) < 115e6


def test_eight_bit_layers_say_once_that_they_cast(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("bitsandbytes.autograd._functions")
    for present in list(logger.filters):
        logger.removeFilter(present)
    model = load_causal_lm(folder, quantization="int8")
    load_causal_lm(folder, quantization="int8")
    assert len(logger.filters) == 1
    with torch.no_grad(), caplog.at_level("WARNING", logger=logger.name):
        model(input_ids=IDS)
    assert [record.getMessage() for record in caplog.records if record.name == logger.name] == [
        "MatMul8bitLt: inputs will be cast from torch.float32 to float16 during quantization"
    ]


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("asked the hub")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", refuse)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", refuse)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"quantization": "4bit"}, r"`quantization` expected to be one of 'nf4', 'int8' or None but got '4bit'. Pass"),
        ({"quantization": 4}, r"got 4. Pass 'nf4' for 4 bits"),
        ({"quantization": "nf4", "dtype": "float64"}, r"of 16 or 32 bits beside `quantization='nf4'` but got float64"),
        ({"quantization": "int8", "dtype": torch.float64}, r"got float64, .* Pass `dtype=torch.bfloat16`"),
    ],
)
@pytest.mark.usefixtures("no_network")
def test_bad_arguments_are_refused_before_anything_is_read(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_causal_lm("owner/name", **arguments)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_what_is_stored_in_float64_is_refused(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, quantization: Any
) -> None:
    save_language_model(make_tiny_model(**WIDE).double(), tiny_tokenizer, tmp_path / "model")
    with pytest.raises(ValueError, match="got float64"):
        load_causal_lm(tmp_path / "model", quantization=quantization)
    assert load_causal_lm(tmp_path / "model", quantization=quantization, dtype="float32").dtype == torch.float32


@pytest.mark.usefixtures("no_network")
def test_a_missing_package_comes_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "bitsandbytes" else find(name, *rest)
    )
    with pytest.raises(ImportError, match="pip install bitsandbytes"):
        load_causal_lm("owner/name", quantization="nf4")


def test_a_hub_id_that_fails_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(location: str, **options: Any) -> None:
        raise OSError("no such repository")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", fail)
    with pytest.raises(FileNotFoundError, match="'owner/name' does not load: no such repository"):
        load_causal_lm("owner/name", quantization="nf4")
