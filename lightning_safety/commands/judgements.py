# SPDX-License-Identifier: Apache-2.0
"""Measuring a model, and the judges that measure it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lightning_safety.files import replace_atomically

if TYPE_CHECKING:
    from lightning_safety.monitoring import Judge


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
    tasks: list[str] | None = None,
    tasks_folder: str | None = None,
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
        tasks: Benchmarks of the evaluation harness (`lm-eval`) to score as well, such as `gsm8k`, by hub id.
        tasks_folder: A folder of tasks of your own, in the harness's YAML.
        output: A JSON file for the results.
        replies: A folder for the replies (readable by you alone; replies to harmful prompts may be harmful).
    """
    from lightning_safety.enforcement import SafetyPatch
    from lightning_safety.language import load_causal_lm, load_tokenizer
    from lightning_safety.monitoring import comparison_table, evaluate_safety
    from lightning_safety.monitoring.harness import TaskScore, evaluate_tasks, task_table
    from lightning_safety.monitoring.table import align

    changes = None if patch is None else SafetyPatch.load(patch)
    language_model = load_causal_lm(model, dtype=dtype, gguf_file=gguf_file)
    tokenizer = load_tokenizer(model, gguf_file=gguf_file)
    columns = {}
    scores: dict[str, list[TaskScore]] = {}
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
        if tasks:
            scores[name] = evaluate_tasks(
                language_model, tokenizer, tasks, folder=tasks_folder, limit=limit, batch_size=batch_size
            )
        if replies is not None:
            columns[name].write_replies(Path(replies) / f"replies_{name}.jsonl")
    print(comparison_table(columns))
    if scores:
        print("\n".join(["", *align(task_table(scores))]))
    if output is not None:
        found = {name: column.to_dict() for name, column in columns.items()}
        for name, of in scores.items():
            found[name]["tasks"] = [asdict(score) for score in of]
        with replace_atomically(output) as temporary:
            temporary.write_text(json.dumps(found, indent=2), encoding="utf-8")


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
