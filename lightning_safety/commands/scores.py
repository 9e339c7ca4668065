# SPDX-License-Identifier: Apache-2.0
"""Scoring weights, and what a mask selects."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal

from lightning_safety.arguments import check_fraction

if TYPE_CHECKING:
    from lightning_safety.scoring import MixtureLayout, RouterLoad, SafetyMask, SafetyObjective

ObjectiveName = Literal["refusal_margin", "refusal_likelihood", "guard_judged"]
_PROMPT_TOKENS = 64


def score(
    model: str,
    output: str,
    fraction: float = 0.01,
    objective: ObjectiveName = "refusal_margin",
    compare: list[ObjectiveName] | None = None,
    examples: str = "harmful",
    split: str | None = "score",
    limit: int | None = None,
    guard: str | None = None,
    convention: str | None = None,
    max_new_tokens: int = 256,
    reduction: Literal["signed", "absolute"] = "signed",
    scale: Literal["std", "magnitude", "none"] = "std",
    batch_size: int = 8,
    passes: int = 1,
    accumulate_on: Literal["device", "cpu"] = "device",
    accumulate_dtype: Literal["float32", "bfloat16"] = "float32",
    autocast: Literal["bfloat16"] | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    gguf_file: str | None = None,
    experts: list[str] | None = None,
    routers: list[str] | None = None,
) -> None:
    """Score every weight of a model by its Expected Safety Impact and save the mask of the highest.

    Args:
        model: A hub id, a folder, a .gguf file or `smollm2-135m-instruct`.
        output: The mask file to write (.safetensors).
        fraction: The share of the scored weights to select, in (0, 1].
        objective: The safety objective: `refusal_margin`, `refusal_likelihood` or `guard_judged`.
        compare: Other objectives to score by; overlap and pattern of all are printed beside a random mask's.
        examples: Harmful prompts with refusals: a built-in set, a file or a hub data set.
        split: Its split; for a file without one, `null`.
        limit: Only the first so many examples.
        guard: For `guard_judged`: the guard, as `model`.
        convention: For `guard_judged`: how the guard is asked; `instructed` for a model that is no guard.
        max_new_tokens: For `guard_judged`: length of the judged replies.
        reduction: `signed` (the paper's) or `absolute`.
        scale: `std` (the paper's), `magnitude` or `none`.
        batch_size: Examples in one forward pass; changes memory and time only.
        passes: Score in so many blocks of weights, one pass over the examples for each, to save memory of a GPU.
        accumulate_on: Where sums of gradients are: on the `device`, or on the `cpu`, in main memory.
        accumulate_dtype: Of these sums: `float32`, or `bfloat16` at half the memory.
        autocast: `bfloat16`: compute under autocast, faster where the processor has bfloat16.
        dtype: The type to load the weights in.
        device: Where to score, for instance `cuda`.
        gguf_file: The name of a GGUF file inside the folder or hub repository.
        experts: For a mixture of experts of no known family: patterns of the modules that hold experts.
        routers: Patterns of the modules that choose among these; they are never scored.
    """
    from lightning_safety.devices import usable_device
    from lightning_safety.language import load_causal_lm, load_tokenizer
    from lightning_safety.scoring import (
        GuardJudgedSafety,
        LeanScoring,
        MixtureLayout,
        RefusalLikelihood,
        RefusalMargin,
        estimate_scoring_memory,
        expected_safety_impact,
        select_random,
        select_top,
    )
    from lightning_safety.scoring.comparison import objective_comparison, sample_scores

    # Now, not after an hour of scoring.
    check_fraction(fraction)
    names = list(dict.fromkeys([objective, *(compare or ())]))
    if "guard_judged" in names and guard is None:
        raise ValueError(
            "`guard` expected to name a guard model for the objective guard_judged but got nothing. Pass for instance "
            "`--guard smollm2-135m-instruct --convention instructed`."
        )
    if "guard_judged" not in names and (guard, convention) != (None, None):
        raise ValueError(
            "`guard` and `convention` expected to be given for the objective guard_judged but the objectives are "
            f"{', '.join(names)}. Pass `--objective guard_judged`, or leave them out."
        )
    objectives: dict[str, SafetyObjective] = {}
    for name in names:
        if name == "guard_judged" and guard is not None:
            objectives[name] = GuardJudgedSafety(
                guard, examples, split=split, limit=limit, convention=convention, max_new_tokens=max_new_tokens
            )
        else:
            written = RefusalLikelihood if name == "refusal_likelihood" else RefusalMargin
            objectives[name] = written(examples, split=split, limit=limit)
    mixture = None if experts is None and routers is None else MixtureLayout(experts or [], routers or [])
    lean = LeanScoring(passes, accumulate_on, accumulate_dtype, autocast)
    described = {"model": model, **(mixture.describe() if mixture is not None else {})}
    language_model: Any = load_causal_lm(model, dtype=dtype, gguf_file=gguf_file)
    language_model.to(usable_device(device))
    tokenizer = load_tokenizer(model, gguf_file=gguf_file)
    masks: dict[str, SafetyMask] = {}
    samples = {}
    for name, chosen in objectives.items():
        options: dict[str, Any] = {"batch_size": batch_size, "reduction": reduction, "mixture": mixture, **asdict(lean)}
        # A judged reply is not known yet: the longest it can be, and room for its prompt.
        longest = (1 if reduction == "absolute" else batch_size) * (max_new_tokens + _PROMPT_TOKENS)
        tokens = longest if name == "guard_judged" else None
        memory = estimate_scoring_memory(language_model, chosen, tokenizer, tokens=tokens, **options)
        print(memory.summary())
        memory.check_free()
        scores = expected_safety_impact(language_model, chosen, tokenizer, scale=scale, **options)
        masks[name] = select_top(scores, fraction, metadata={**described, **chosen.describe()})
        if compare:
            samples[name] = sample_scores(scores)
        if compare and name == names[-1]:
            masks["random"] = select_random(scores, fraction, seed=0)
    mask = masks[objective]
    mask.save(output)
    if compare:
        print(objective_comparison(masks, samples))
    else:
        print(mask.describe(_router_load(mask, language_model, objectives[objective], tokenizer, mixture)).table())
    print(f"\n{mask.count:,} of {mask.scored:,} scored weights selected. Mask: {output}")


def _router_load(
    mask: SafetyMask, model: Any, objective: SafetyObjective, tokenizer: Any, mixture: MixtureLayout | None
) -> RouterLoad | None:
    """Return the load of a mixture of experts; None for a dense model, and with a line for one that hides it."""
    from lightning_safety.scoring import measure_router_load

    if not mask.describe().experts:
        return None
    try:
        return measure_router_load(model, objective, tokenizer, mixture=mixture)
    except ValueError as error:
        print(f"Router load is left out: {error}\n")
        return None


def mask_describe(file: str, heatmap: str | None = None) -> None:
    """Show which layers and components the weights of a mask lie in, against the size of each.

    Args:
        file: A mask file.
        heatmap: A PNG file to draw the same in.
    """
    from lightning_safety.scoring import SafetyMask

    description = SafetyMask.load(file).describe()
    print(description.table())
    if heatmap is not None:
        description.heatmap(heatmap)
