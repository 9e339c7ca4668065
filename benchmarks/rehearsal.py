# SPDX-License-Identifier: Apache-2.0
"""What one safety rehearsal takes beside a training step of SmolLM2-135M-Instruct, and the look that tells its need.

python benchmarks/rehearsal.py

Full fine-tuning in float32, AdamW, batches of 4 × 128 tokens. Rehearsals are of the length that `OwnReplies` gives.
"""

from __future__ import annotations

from itertools import count

import torch
from side_by_side import compare

from lightning_safety.data import load_prompts
from lightning_safety.enforcement.rehearsal import Rehearsal
from lightning_safety.language import BUNDLED_MODEL, load_causal_lm, load_tokenizer
from lightning_safety.monitoring import OwnReplies
from lightning_safety.monitoring.margin import opening_likelihood

ROUNDS = 9
BATCH, LENGTH = 4, 128
WATCHED = 8


def main() -> None:
    """Print the table."""
    torch.manual_seed(0)
    model, tokenizer = load_causal_lm(BUNDLED_MODEL, dtype="float32").train(), load_tokenizer(BUNDLED_MODEL)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-6)
    tokens = torch.randint(100, 49000, (BATCH, LENGTH))
    watched = load_prompts("harmful", split="monitor")[:WATCHED]
    rehearsals = {}
    for mode in ("add", "project"):
        objective = OwnReplies()
        # The model refuses next to nothing: of the length of its own replies, these are written ones.
        objective.load_state_dict(
            {
                kind: [[row.prompt, row.response] for row in load_prompts(kind, split="train")[:24]]
                for kind in ("harmful", "borderline")
            }
        )
        rehearsal = Rehearsal(objective, mode=mode, batch_size=4)
        rehearsals[mode] = rehearsal.prepare(model, tokenizer, objective.state_dict())

    def step() -> None:
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()

    step()
    position = count()
    ways = {
        "a training step": step,
        "a rehearsal, add": lambda: rehearsals["add"].mix(model, parameters, next(position)),
        "a rehearsal, project": lambda: rehearsals["project"].mix(model, parameters, next(position)),
        "an adaptive look": lambda: opening_likelihood(model, tokenizer, watched, tokens=4),
    }
    compare(ways, rounds=ROUNDS, unit="seconds")


if __name__ == "__main__":
    main()
