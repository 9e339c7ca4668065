# SPDX-License-Identifier: Apache-2.0
"""The tokens of one vocabulary in terms of those of another."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What a part of a character decodes to, and the name of a byte in vocabularies that fall back on bytes: these are
# alike only where their names are.
_BROKEN = "\ufffd"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def vocabulary_map(source: PreTrainedTokenizerBase, target: PreTrainedTokenizerBase) -> Tensor:
    """Split every token of one vocabulary evenly over the tokens that another tokenizer makes of its text.

    A token that the other vocabulary has as well goes to that one alone. All tokens are decoded and tokenised in a few
    calls, not one by one: some seconds for 128,000 tokens.

    Args:
        source: A fast tokenizer.
        target: Another one.

    Returns:
        Sparse float32 [source vocabulary, target vocabulary], coalesced. A row sums to 1, or to 0 for special tokens
        and for parts of a character that only the source has.

    Raises:
        ValueError: One of the tokenizers is slow (has no ``tokenizers`` backend).
    """
    check_fast(source, "source")
    check_fast(target, "target")
    theirs, places = _token_texts(target), target.get_vocab()
    by_text = {text: token_id for token_id, text in reversed(theirs.items())}
    entries: list[tuple[int, int, float]] = []
    unmatched: dict[int, str] = {}
    texts = _token_texts(source)
    for token_id, (name, text) in zip(texts, _named(source, texts), strict=True):
        # By name and text first: the text of a byte says nothing, and a name alone means another thing elsewhere.
        match = places.get(name)
        if match is None or theirs.get(match) != text:
            match = by_text.get(text) if _BROKEN not in text else None
        if match is not None:
            entries.append((token_id, match, 1.0))
        elif text and _BROKEN not in text:
            unmatched[token_id] = text
    encodings = target.backend_tokenizer.encode_batch_fast(list(unmatched.values()), add_special_tokens=False)
    for token_id, encoding in zip(unmatched, encodings, strict=True):
        parts = [part for part in encoding.ids if part in theirs]
        entries += [(token_id, part, 1 / len(parts)) for part in parts]
    rows, columns, shares = zip(*entries, strict=True) if entries else ((), (), ())
    values = torch.tensor(shares, dtype=torch.float32)
    indices = torch.tensor([rows, columns], dtype=torch.int64)
    size = (vocabulary_size(source), vocabulary_size(target))
    return torch.sparse_coo_tensor(indices, values, size, check_invariants=True).coalesce()


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return one more than the tokenizer's highest token."""
    return int(max(tokenizer.get_vocab().values())) + 1


def same_vocabulary(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers give every token the same number."""
    return first is second or first.get_vocab() == second.get_vocab()


def check_fast(tokenizer: PreTrainedTokenizerBase, argument: str) -> None:
    """Raise ValueError unless the tokenizer says which characters a token comes from."""
    if not tokenizer.is_fast:
        raise ValueError(
            f"`{argument}` expected to be a fast tokenizer but {type(tokenizer).__name__} is slow: it does not say "
            "which characters a token comes from. Load it with `use_fast=True`."
        )


def _token_texts(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Return the text of each token but the special ones, as it reads behind another word's letter."""
    special = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids = sorted(set(tokenizer.get_vocab().values()) - special)
    backend = tokenizer.backend_tokenizer
    names = tokenizer.convert_ids_to_tokens(ids)
    alone = backend.decode_batch([[token_id] for token_id in ids], skip_special_tokens=False)
    # Alone, a token would lose the space before it, or keep the mark of a word's continuation.
    anchor, start = next(
        ((token_id, text) for token_id, text in zip(ids, alone, strict=True) if len(text) == 1 and text.isalpha()),
        (None, ""),
    )
    if anchor is None:
        return dict(zip(ids, alone, strict=True))
    behind = backend.decode_batch([[anchor, token_id] for token_id in ids], skip_special_tokens=False)
    texts = {
        token_id: text.removeprefix(start) if text.startswith(start) else whole
        for token_id, text, whole in zip(ids, behind, alone, strict=True)
    }
    return texts | {token_id: _BROKEN for token_id, name in zip(ids, names, strict=True) if _BYTE.fullmatch(name)}


def _named(tokenizer: PreTrainedTokenizerBase, texts: dict[int, str]) -> list[tuple[str, str]]:
    return list(zip(tokenizer.convert_ids_to_tokens(list(texts)), texts.values(), strict=True))
