# SPDX-License-Identifier: Apache-2.0
"""Where a tokenizer is looked for, in which order."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import transformers

from lightning_safety.language import find_tokenizer, load_causal_lm, pad_token_id, save_language_model
from tests.tiny import make_tiny_tokenizer


@pytest.fixture
def saved(tiny_model, tiny_tokenizer, tmp_path):
    return save_language_model(tiny_model, tiny_tokenizer, tmp_path / "model")


def test_the_first_of_argument_module_and_data_module_is_taken():
    first, second, third = make_tiny_tokenizer(), make_tiny_tokenizer(), make_tiny_tokenizer()
    module, datamodule = SimpleNamespace(tokenizer=second), SimpleNamespace(tokenizer=third)
    assert find_tokenizer(first, module=module, datamodule=datamodule) is first
    assert find_tokenizer(module=module, datamodule=datamodule) is second
    assert find_tokenizer(module=SimpleNamespace(tokenizer=None), datamodule=datamodule) is third
    assert find_tokenizer(module=object(), datamodule=datamodule) is third


@pytest.mark.parametrize("kind", [str, type(None)])
def test_a_path_is_loaded_and_so_is_what_the_model_was_loaded_from(saved, tiny_tokenizer, kind):
    if kind is str:
        found = [
            find_tokenizer(str(saved)),
            find_tokenizer(saved),
            find_tokenizer(module=SimpleNamespace(tokenizer=saved)),
        ]
    else:
        found = [find_tokenizer(module=object(), model=load_causal_lm(saved))]
    assert all(tokenizer("a b").input_ids == tiny_tokenizer("a b").input_ids for tokenizer in found)


def test_a_hub_id_of_a_model_is_looked_up_in_the_cache_only(monkeypatch):
    asked = []

    def fail(location, **options):
        asked.append((location, options["local_files_only"]))
        raise OSError("not in the cache")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", fail)
    model = SimpleNamespace(name_or_path="owner/name")
    with pytest.raises(
        ValueError, match=r"on this machine for the model 'owner/name'\. Pass `tokenizer=`.*not in the cache"
    ):
        find_tokenizer(model=model)
    assert asked == [("owner/name", True)]


def test_none_says_where_it_was_looked_for(tiny_model):
    with pytest.raises(ValueError, match=r"none found in `tokenizer`, `module\.tokenizer`; the model does not say"):
        find_tokenizer(module=SimpleNamespace(tokenizer=None), model=tiny_model)
    with pytest.raises(ValueError, match=r"none found in `tokenizer`\. Pass `tokenizer=`"):
        find_tokenizer()


def test_what_is_no_tokenizer_is_refused():
    with pytest.raises(TypeError, match=r"`module\.tokenizer` expected to be a tokenizer of transformers but got int"):
        find_tokenizer(module=SimpleNamespace(tokenizer=3))


def test_padding_is_the_padding_token_else_the_end_of_text():
    tokenizer = make_tiny_tokenizer()
    assert pad_token_id(tokenizer) == 0
    tokenizer.pad_token = None
    assert pad_token_id(tokenizer) == tokenizer.eos_token_id == 2
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="expected to have a padding or an end-of-text token"):
        pad_token_id(tokenizer)
