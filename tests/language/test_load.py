# SPDX-License-Identifier: Apache-2.0
"""Sources of models and tokenizers: what is loaded, and what is said of those that are none."""

from __future__ import annotations

import re

import pytest
import torch
import transformers

from lightning_safety.language import load_causal_lm, load_tokenizer, save_language_model


@pytest.fixture
def folder(tiny_model, tiny_tokenizer, tmp_path):
    return save_language_model(tiny_model, tiny_tokenizer, tmp_path / "models" / "tiny")


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("asked the hub")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", refuse)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", refuse)


def test_a_folder_gives_the_model_that_was_saved(folder, tiny_model, tiny_tokenizer):
    for source in (folder, str(folder)):
        model = load_causal_lm(source)
        assert not model.training
        assert model.name_or_path == str(folder)
        for name, value in tiny_model.state_dict().items():
            assert torch.equal(model.state_dict()[name], value)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert load_tokenizer(source)("a b").input_ids == tiny_tokenizer("a b").input_ids


@pytest.mark.parametrize("dtype", ["bfloat16", "torch.bfloat16", torch.bfloat16])
def test_a_dtype_is_a_name_or_an_object(folder, dtype):
    assert {parameter.dtype for parameter in load_causal_lm(folder, dtype=dtype).parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [None, "auto"])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_without_a_dtype_weights_stay_as_stored(tiny_model, tiny_tokenizer, tmp_path, stored, dtype):
    save_language_model(tiny_model.to(stored), tiny_tokenizer, tmp_path / "model")
    assert load_causal_lm(tmp_path / "model", dtype=dtype).dtype == stored


@pytest.mark.parametrize("dtype", ["bfloat61", torch.int8, 16])
def test_an_unknown_dtype_names_the_closest(no_network, dtype):
    with pytest.raises(ValueError, match=r"`dtype` expected to be a floating-point dtype but got .*`bfloat16`"):
        load_causal_lm("anything", dtype=dtype)


@pytest.mark.parametrize("load", [load_causal_lm, load_tokenizer])
@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("smollm2-135m-instrct", ValueError, "but got 'smollm2-135m-instrct'. Did you mean `smollm2-135m-instruct`?"),
        ("model", ValueError, "Did you mean `models`?"),
        ("models/tyni", FileNotFoundError, "there is no 'models/tyni'. Did you mean `tiny`?"),
        ("./models/tyni", FileNotFoundError, "Did you mean `tiny`?"),
        ("models/tiny/weights.gguf", FileNotFoundError, "there is no 'models/tiny/weights.gguf'"),
        ("nowhere/weights.gguf", FileNotFoundError, "there is no 'nowhere/weights.gguf'. Choose from `models`"),
        ("models/tiny/config.json", ValueError, "got the file 'models/tiny/config.json'"),
        ("a/b/c", FileNotFoundError, "there is no 'a/b/c'"),
        (3, TypeError, "expected to be a name or a path but got int"),
    ],
)
def test_what_is_no_source_is_refused_without_a_network(folder, monkeypatch, no_network, load, source, error, message):
    monkeypatch.chdir(folder.parent.parent)
    with pytest.raises(error, match=re.escape(message)):
        load(source)


@pytest.mark.parametrize("load", [load_causal_lm, load_tokenizer])
def test_a_gguf_file_that_is_not_in_the_folder_is_named(folder, no_network, load):
    with pytest.raises(FileNotFoundError, match=r"there is no .*weights\.gguf"):
        load(folder, gguf_file="weights.gguf")


@pytest.mark.parametrize("load", [load_causal_lm, load_tokenizer])
def test_a_folder_without_a_model_says_so(tmp_path, load):
    with pytest.raises((FileNotFoundError, ValueError), match=r"(?i)config|tokenizer"):
        load(tmp_path)


def test_a_hub_id_is_passed_on_and_its_failure_explained(monkeypatch):
    asked = []

    def fail(location, **options):
        asked.append((location, options["trust_remote_code"]))
        raise OSError("no such repository")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(FileNotFoundError, match="'owner/name' does not load: no such repository"):
        load_causal_lm("owner/name")
    assert asked == [("owner/name", False)]
