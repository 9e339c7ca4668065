# SPDX-License-Identifier: Apache-2.0
"""Seconds to map a vocabulary of 128,000 tokens onto SmolLM2's 49,152, against tokenising token by token.

OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false python benchmarks/vocabulary_map.py

The larger vocabulary is SmolLM2's own with further merges of two of its tokens, so that most of it has to be split.
"""

from __future__ import annotations

import json
import random
from functools import partial

from side_by_side import compare
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lightning_safety.language import BUNDLED_MODEL, load_tokenizer
from lightning_safety.language.vocabulary_map import vocabulary_map

SIZE = 128_000


def enlarge(tokenizer: PreTrainedTokenizerBase, size: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer with more merges, of pairs drawn at random."""
    written = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary, merges = written["model"]["vocab"], written["model"]["merges"]
    draw = random.Random(0)
    tokens = [token for token in vocabulary if token not in tokenizer.all_special_tokens and len(token) > 1]
    while len(vocabulary) < size:
        first, second = draw.sample(tokens, 2)
        if first + second not in vocabulary:
            vocabulary[first + second] = len(vocabulary)
            merges.append([first, second])
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(written)))


def map_token_by_token(source: PreTrainedTokenizerBase, target: PreTrainedTokenizerBase) -> dict[int, list[int]]:
    """The same by one call for each token, as published code does it."""
    return {
        token_id: target(source.decode([token_id]), add_special_tokens=False)["input_ids"]
        for token_id in range(len(source))
    }


def main() -> None:
    """Time both in turns, and print medians and spread."""
    target = load_tokenizer(BUNDLED_MODEL)
    source = enlarge(target, SIZE)
    print(f"{len(source):,} tokens onto {len(target):,}\n")
    compare(
        {
            "vocabulary_map": partial(vocabulary_map, source, target),
            "token by token": partial(map_token_by_token, source, target),
        },
        rounds=5,
        unit="seconds",
    )


if __name__ == "__main__":
    main()
