# SPDX-License-Identifier: Apache-2.0
"""The guard-judged score of SmolLM2-135M-Instruct, which is its own guard here, against one prompt at a time.

python benchmarks/guard_scoring.py

"As described" is the reference, from the paper's description (arXiv 2604.08297, §3): for each prompt the model's own
`generate`, then the model on prompt and reply, the relaxed reply by the guard's embeddings, the guard, and one backward
pass through both to every weight. It has no Gumbel noise, nor has ours beside it, so that their gradients can be
compared. The third way is ours with batches of one.
"""

from __future__ import annotations

import copy
from functools import partial

import torch
from side_by_side import parse_arguments, print_table, print_times, summary, take_turns, write_json
from torch import Tensor
from torch.nn import functional

from lightning_safety.data import Example, load_prompts
from lightning_safety.language import BUNDLED_MODEL, load_causal_lm, load_tokenizer
from lightning_safety.language.alignment import find_run
from lightning_safety.language.chat import tokenize_reply
from lightning_safety.language.guard_model import GuardModel
from lightning_safety.language.guards import tokenize_judgement
from lightning_safety.scoring import GuardJudgedSafety, scored_weights
from lightning_safety.scoring.guard_gradient import answer_margins, input_embeddings
from lightning_safety.scoring.impact import mean_gradients

ROUNDS, PROMPTS, NEW_TOKENS = 3, 16, 128
TEMPERATURE = 0.3
DESCRIBED = "as described, one prompt at a time"


def main() -> None:
    """Print both tables."""
    arguments = parse_arguments(__doc__)
    rounds, count, new_tokens = (1, 2, 8) if arguments.quick else (ROUNDS, PROMPTS, NEW_TOKENS)
    model, tokenizer = load_causal_lm(BUNDLED_MODEL, dtype="float32").eval(), load_tokenizer(BUNDLED_MODEL)
    judge = copy.deepcopy(model).requires_grad_(False)
    guard = GuardModel(judge, tokenizer=tokenizer, convention="instructed")
    prompts = load_prompts("harmful", split="score")[:count]
    found: dict[str, dict[str, Tensor]] = {}

    def ours(name: str, batch_size: int) -> None:
        objective = GuardJudgedSafety(
            guard,
            prompts,
            max_new_tokens=new_tokens,
            temperature=TEMPERATURE,
            noise=False,
            batch_size=batch_size,
        )
        size = min(batch_size, 8)
        found[name] = mean_gradients(model, objective, tokenizer, batch_size=size, show_progress=False)

    def described() -> None:
        found[DESCRIBED] = _one_at_a_time(model, guard, prompts, new_tokens)

    ways = {
        DESCRIBED: described,
        "GuardJudgedSafety": partial(ours, "GuardJudgedSafety", count),
        "GuardJudgedSafety, batches of one": partial(ours, "GuardJudgedSafety, batches of one", 1),
    }
    times = take_turns(ways, rounds=rounds)
    print(f"{count} prompts of `harmful/score`, replies of up to {new_tokens} tokens\n")
    print_times(times, unit="seconds", against=DESCRIBED)
    apart = {name: _distance(gradients, found[DESCRIBED]) for name, gradients in found.items() if name != DESCRIBED}
    print_table(["", "distance of all gradients, of their norm"], [(name, f"{far:.1e}") for name, far in apart.items()])
    settings = {"prompts": count, "max_new_tokens": new_tokens, "rounds": rounds, "temperature": TEMPERATURE}
    write_json(arguments, settings=settings, seconds=summary(times, against=DESCRIBED), distance=apart)


def _one_at_a_time(
    model: torch.nn.Module, guard: GuardModel, prompts: list[Example], new_tokens: int
) -> dict[str, Tensor]:
    """Return the mean gradient of −S by every weight that is scored."""
    tokenizer = guard.tokenizer
    weights = scored_weights(model)
    table = input_embeddings(guard.model).weight
    sums = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for example in prompts:
        turn = [{"role": "user", "content": example.prompt}]
        asked = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        written = model.generate(**asked, max_new_tokens=new_tokens, do_sample=False)  # type: ignore[operator]
        reply = tokenizer.decode(written[0, asked["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        tokens, start = tokenize_reply(tokenizer, example.prompt, reply)
        ids = torch.tensor([[token.id for token in tokens]])
        logits = model(input_ids=ids, use_cache=False).logits[0, start - 1 : -1]
        soft = (logits / TEMPERATURE).softmax(dim=-1)
        relaxed = functional.one_hot(ids[0, start:], len(table)) + soft - soft.detach()
        question = tokenize_judgement(tokenizer, guard.convention, example.prompt, reply)
        place = find_run(question, tokens[start:])
        if place is None:
            raise RuntimeError("The guard expected to see the reply by the same tokens.")
        embedded = table[torch.tensor([token.id for token in question])]
        end = place + len(tokens) - start
        embedded = torch.cat([embedded[:place], relaxed @ table, embedded[end:]])
        margins, _ = answer_margins(guard, embedded[None], torch.ones(1, len(embedded), dtype=torch.int64))
        model.zero_grad()
        (-margins.sum()).backward()
        for name, weight in weights.items():
            if weight.grad is not None:
                sums[name] += weight.grad
    model.zero_grad()
    return {name: total / len(prompts) for name, total in sums.items()}


def _distance(gradients: dict[str, Tensor], others: dict[str, Tensor]) -> float:
    """Return the norm of the difference of two gradients over that of the second."""
    apart = sum(float((gradients[name] - other).square().sum()) for name, other in others.items())
    return (apart / sum(float(other.square().sum()) for other in others.values())) ** 0.5


if __name__ == "__main__":
    main()
