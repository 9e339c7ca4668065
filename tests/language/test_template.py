# SPDX-License-Identifier: Apache-2.0
"""Templates that cannot be used say why."""

from __future__ import annotations

import gc
import weakref

import pytest

from lightning_safety.language import encode_example, encode_prompt
from lightning_safety.language.template import chat_frame
from tests.language.templates import LOOP, TEMPLATES, make_tokenizer


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("", "expected to have a chat template but has none"),
        ("{{ messages[0]['content'] }}", "the text of the assistant once but it loses it"),
        (LOOP + "{{ message['content'] }}{% endfor %}{{ messages[0]['content'] }}", "the user once but it repeats it"),
        (LOOP + "{{ message['content'] | upper }}{% endfor %}", "the text of the user once but it loses it"),
        (LOOP + "{{ message['content'] | replace(' ', '_') }}{% endfor %}", "changes it in another way"),
        ("{{ raise_exception('No assistants here') }}", "fails: No assistants here"),
        (LOOP + "{{ message['content']['text'] + 1 }}{% endfor %}", "turns but fails: "),
    ],
)
def test_an_unusable_template_is_refused(template, message):
    tokenizer = make_tokenizer(template)
    with pytest.raises(ValueError, match=message):
        encode_example(tokenizer, "Hello", "World")


def test_another_template_or_token_is_noticed():
    tokenizer = make_tokenizer(TEMPLATES["chatml"])
    before = encode_prompt(tokenizer, "Hello")
    tokenizer.chat_template = TEMPLATES["default system prompt"]
    assert tokenizer.decode(encode_prompt(tokenizer, "Hello")).startswith("<|im_start|>system\nBe kind.")
    tokenizer.chat_template = TEMPLATES["chatml"]
    assert encode_prompt(tokenizer, "Hello") == before
    tokenizer.add_special_tokens({"bos_token": "Hello"})
    assert tokenizer.bos_token_id not in encode_prompt(tokenizer, "Hello")


def test_a_frame_keeps_no_tokenizer_alive():
    tokenizer = make_tokenizer(TEMPLATES["chatml"])
    assert chat_frame(tokenizer, turns=2) is chat_frame(tokenizer, turns=2)
    reference = weakref.ref(tokenizer)
    del tokenizer
    gc.collect()
    assert reference() is None
