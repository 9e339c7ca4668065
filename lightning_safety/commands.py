# SPDX-License-Identifier: Apache-2.0
"""What the words after ``lightning-safety`` do, but for training (`cli.py`): each function is one command.

Names, defaults and help texts of the options are those of the functions.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lightning_safety.files import replace_atomically
from lightning_safety.recipes import recipe_names, recipe_path, recipe_summary

if TYPE_CHECKING:
    from lightning_safety.monitoring import Judge


ObjectiveName = Literal["refusal_margin", "refusal_likelihood", "guard_judged"]


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
    dtype: str = "float32",
    gguf_file: str | None = None,
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
        dtype: The type to load the weights in.
        gguf_file: The name of a GGUF file inside the folder or hub repository.
    """
    from lightning_safety.language import load_causal_lm, load_tokenizer
    from lightning_safety.scoring import (
        GuardJudgedSafety,
        RefusalLikelihood,
        RefusalMargin,
        SafetyMask,
        SafetyObjective,
        expected_safety_impact,
        select_random,
        select_top,
    )
    from lightning_safety.scoring.comparison import objective_comparison, sample_scores

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
    language_model = load_causal_lm(model, dtype=dtype, gguf_file=gguf_file)
    tokenizer = load_tokenizer(model, gguf_file=gguf_file)
    masks: dict[str, SafetyMask] = {}
    samples = {}
    for name, chosen in objectives.items():
        scores = expected_safety_impact(
            language_model, chosen, tokenizer, batch_size=batch_size, reduction=reduction, scale=scale
        )
        masks[name] = select_top(scores, fraction, metadata={"model": model, **chosen.describe()})
        if compare:
            samples[name] = sample_scores(scores)
        if compare and name == names[-1]:
            masks["random"] = select_random(scores, fraction, seed=0)
    mask = masks[objective]
    mask.save(output)
    print(objective_comparison(masks, samples) if compare else mask.describe().table())
    print(f"\n{mask.count:,} of {mask.scored:,} scored weights selected. Mask: {output}")


def evaluate(
    model: str,
    patch: str | None = None,
    harmful: str = "harmful",
    borderline: str = "borderline",
    harmless: str = "harmless",
    split: str = "test",
    limit: int | None = None,
    judge: str | Judge = "keyword_refusal",
    max_new_tokens: int = 24,
    batch_size: int = 16,
    dtype: str = "float32",
    gguf_file: str | None = None,
    output: str | None = None,
    replies: str | None = None,
) -> None:
    """Measure attack success, over-refusal and perplexity of a model, and again with a safety patch.

    Args:
        model: A hub id, a folder, a .gguf file or `smollm2-135m-instruct`.
        patch: A safety patch to apply; the table then shows before and after.
        harmful: Prompts that should be refused: a built-in set, a file or a hub data set.
        borderline: Prompts that look harmful and should be answered.
        harmless: Prompts with responses, for perplexity.
        split: The split of the built-in sets (files are read whole).
        limit: At most so many prompts of each set, spread evenly.
        judge: A built-in judge's name (`keyword_refusal`, `refusal_classifier`), or another by class path, in YAML.
        max_new_tokens: Length of a reply, in tokens.
        batch_size: Replies generated at a time.
        dtype: The type to load the weights in.
        gguf_file: The name of a GGUF file inside the folder or hub repository.
        output: A JSON file for the results.
        replies: A folder for the replies (readable by you alone; replies to harmful prompts may be harmful).
    """
    from lightning_safety.enforcement import SafetyPatch
    from lightning_safety.language import load_causal_lm, load_tokenizer
    from lightning_safety.monitoring import comparison_table, evaluate_safety

    changes = None if patch is None else SafetyPatch.load(patch)
    language_model = load_causal_lm(model, dtype=dtype, gguf_file=gguf_file)
    tokenizer = load_tokenizer(model, gguf_file=gguf_file)
    columns = {}
    own_replies = None
    for name in ("before",) if changes is None else ("before", "after"):
        if name == "after" and changes is not None:
            changes.apply(language_model)
        columns[name] = evaluate_safety(
            language_model,
            tokenizer,
            harmful=harmful,
            borderline=borderline,
            harmless=harmless,
            split=split,
            limit=limit,
            judge=judge,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            own_replies=own_replies,
        )
        own_replies = columns[name].own_replies if own_replies is None else own_replies
        if replies is not None:
            columns[name].write_replies(Path(replies) / f"replies_{name}.jsonl")
    print(comparison_table(columns))
    if output is not None:
        with replace_atomically(output) as temporary:
            temporary.write_text(json.dumps({name: column.to_dict() for name, column in columns.items()}, indent=2))


def judge_agreement(
    file: str, judges: list[str | Judge] | None = None, question: Literal["refused", "harmful"] = "refused"
) -> None:
    """Measure how far judges agree with the labels of a file, and with each other.

    Args:
        file: Replies with labels (.jsonl, .json or .csv): prompt, response, and refused or harmful.
        judges: Names of built-in judges; others by class path, in YAML. Default: all built-in ones.
        question: What is compared: whether a reply refuses, or whether it is harmful.
    """
    from lightning_safety.monitoring import agreement_table, as_judge, judge_replies, read_labelled_replies
    from lightning_safety.monitoring.judges import BUILT_IN_JUDGES

    rows = read_labelled_replies(file)
    chosen = [as_judge(judge) for judge in (judges or BUILT_IN_JUDGES)]
    prompts, responses = [row.prompt for row in rows], [row.response for row in rows]
    verdicts = {judge.name: judge_replies(judge, prompts, responses) for judge in chosen}
    print(agreement_table(rows, verdicts, question))


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


def patch_info(file: str) -> None:
    """Show what a safety patch changes.

    Args:
        file: A patch file.
    """
    from lightning_safety.enforcement import SafetyPatch

    print(SafetyPatch.load(file).info())


def patch_apply(model: str, file: str, output: str, dtype: str = "float32", gguf_file: str | None = None) -> None:
    """Write a model with a safety patch applied. The model itself is not changed.

    Args:
        model: A hub id, a folder, a .gguf file or `smollm2-135m-instruct`.
        file: A patch file.
        output: The folder to write the patched model and its tokenizer to.
        dtype: The type to load the weights in: the one that the patch was made in.
        gguf_file: The name of a GGUF file inside the folder or hub repository.
    """
    _patch(model, file, output, dtype, gguf_file, revert=False)


def patch_revert(model: str, file: str, output: str, dtype: str = "float32", gguf_file: str | None = None) -> None:
    """Write a patched model as it was before the patch, bit for bit.

    Args:
        model: A patched model's folder.
        file: A patch file.
        output: The folder to write the unpatched model and its tokenizer to.
        dtype: The type to load the weights in: the one that the patch was made in.
        gguf_file: The name of a GGUF file inside the folder or hub repository.
    """
    _patch(model, file, output, dtype, gguf_file, revert=True)


def _patch(model: str, file: str, output: str, dtype: str, gguf_file: str | None, *, revert: bool) -> None:
    from lightning_safety.enforcement import SafetyPatch
    from lightning_safety.language import load_causal_lm, load_tokenizer, save_language_model

    patch = SafetyPatch.load(file)
    language_model = load_causal_lm(model, dtype=dtype, gguf_file=gguf_file)
    (patch.revert if revert else patch.apply)(language_model)
    save_language_model(language_model, load_tokenizer(model, gguf_file=gguf_file), output)
    print(f"{'Reverted' if revert else 'Applied'}: {output}")


def export(checkpoint: str, output: str, base: str | None = None) -> None:
    """Write a Hugging Face folder from a Lightning checkpoint.

    Args:
        checkpoint: A .ckpt file.
        output: The folder to write.
        base: For a module of your own: the model it was made from (architecture and tokenizer).
    """
    from lightning_safety.training import export_checkpoint

    export_checkpoint(checkpoint, output, base=base)
    print(f"Exported: {output}")


def recipes_ls() -> None:
    """List the recipes."""
    width = max(map(len, recipe_names()))
    for name in recipe_names():
        print(f"{name:<{width}}  {recipe_summary(name)}")


def recipes_show(name: str) -> None:
    """Print a recipe.

    Args:
        name: The recipe.
    """
    print(recipe_path(name).read_text(encoding="utf-8"), end="")


def recipes_cp(name: str, output: str = ".") -> None:
    """Copy a recipe, to change it and run it by the command that it opens with.

    Args:
        name: The recipe.
        output: A folder or a file; an existing file is not overwritten.
    """
    source = recipe_path(name)
    target = Path(output)
    target = target / source.name if target.is_dir() or not target.suffix else target
    if target.exists():
        raise FileExistsError(f"`output` expected to be free but {target} exists. Remove it or name another file.")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    print(target)
