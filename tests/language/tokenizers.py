# SPDX-License-Identifier: Apache-2.0
"""Tokenizers of other kinds than the tiny byte-level one, trained on the built-in prompts."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lightning_safety.data import load_prompts
from tests.tiny import CHAT_TEMPLATE

SPECIAL = ["[UNK]", "[PAD]", "<|im_start|>", "<|im_end|>"]


def make_wordpiece_tokenizer(vocabulary: int = 700) -> PreTrainedTokenizerFast:
    """WordPiece: white space is dropped, words go on with ``##``."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))  # type: ignore[call-arg]
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    trainer = trainers.WordPieceTrainer(vocab_size=vocabulary, special_tokens=SPECIAL, show_progress=False)
    return _finished(tokenizer, trainer)


def make_metaspace_tokenizer(vocabulary: int = 600) -> PreTrainedTokenizerFast:
    """BPE over characters with ``▁`` for spaces, as SentencePiece writes them."""
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=SPECIAL, show_progress=False)
    return _finished(tokenizer, trainer)


def _finished(tokenizer: Tokenizer, trainer: object) -> PreTrainedTokenizerFast:
    texts = [f"{row.prompt} {row.response}" for row in load_prompts("harmful", split="score")]
    tokenizer.train_from_iterator([*texts, *["user assistant system\n safe unsafe é 中 文"] * 20], trainer)  # type: ignore[arg-type]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        eos_token="<|im_end|>",
        pad_token="[PAD]",
        chat_template=CHAT_TEMPLATE,
    )
