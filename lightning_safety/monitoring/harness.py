# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of usefulness, such as GSM8K, by the maintained evaluation harness (`lm-eval`)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lightning_safety.arguments import closest
from lightning_safety.language import evaluation_mode, find_language_model
from lightning_safety.monitoring.rates import finite_or_none
from lightning_safety.randomness import preserved_random_state

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_BOOTSTRAP = 1000


@dataclass(frozen=True)
class TaskScore:
    """What the harness says of one metric of one task.

    Attributes:
        task: Its name.
        metric: Such as ``exact_match,strict-match``: the metric and the harness's filter.
        value: The mean over examples.
        standard_error: Of it; None where the harness gives none.
        examples: How many.
    """

    task: str
    metric: str
    value: float
    standard_error: float | None
    examples: int


def evaluate_tasks(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    folder: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    apply_chat_template: bool = True,
) -> list[TaskScore]:
    """Score a model on tasks of the harness; most download their data from the hub.

    Args:
        model: A causal language model. It is left as it was found.
        tokenizer: Its tokenizer.
        tasks: Names of tasks or groups that the harness knows, such as ``gsm8k`` or ``mmlu``.
        folder: A folder of tasks of your own, in the harness's YAML.
        limit: At most so many examples of each task.
        batch_size: Examples at a time.
        apply_chat_template: Whether questions stand in the tokenizer's chat template.

    Returns:
        The scores, in the order of the tasks.

    Raises:
        ModuleNotFoundError: The harness is not installed.
        ValueError: There is no such task; the message names the closest.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "`tasks` needs the evaluation harness, which is not installed. Install it with"
            " `pip install 'lightning-safety[tasks]'`."
        ) from error
    manager = _task_manager(None if folder is None else os.fspath(folder))
    known = [*manager.all_subtasks, *manager.all_groups]
    for task in tasks:
        if task not in known:
            raise ValueError(
                f"`tasks` expected names that the evaluation harness knows but got {task!r}."
                f" {closest(task, known)} For one of your own, pass the folder of its YAML file."
            )
    language_model: Any = find_language_model(model)
    with torch.no_grad(), evaluation_mode(language_model), preserved_random_state():
        found: Any = simple_evaluate(
            HFLM(pretrained=language_model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=list(tasks),
            limit=limit,
            task_manager=manager,
            apply_chat_template=apply_chat_template,
            log_samples=False,
            # Of means the harness has a formula; of other metrics it draws samples.
            bootstrap_iters=_BOOTSTRAP,
        )
    return [score for task in tasks for score in _scores(task, found)]


@lru_cache(maxsize=1)
def _task_manager(folder: str | None) -> Any:
    """Return what knows all tasks; it reads thousands of files, so that the one for before serves after, too."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=folder)


def _scores(task: str, found: Any) -> list[TaskScore]:
    results, scores = found["results"][task], []
    examples = _examples(task, found)
    for metric, value in results.items():
        name, _, chosen = metric.partition(",")
        if not isinstance(value, int | float) or name.endswith("_stderr") or not chosen:
            continue
        error = results.get(f"{name}_stderr,{chosen}")
        error = finite_or_none(float(error)) if isinstance(error, int | float) else None
        scores.append(TaskScore(task, metric, float(value), error, examples))
    return scores


def _examples(task: str, found: Any) -> int:
    """Return how many examples a task has, or all tasks of a group."""
    if task in found["n-samples"]:
        return int(found["n-samples"][task]["effective"])
    return sum(_examples(part, found) for part in found["group_subtasks"][task])


def task_table(columns: dict[str, list[TaskScore]]) -> list[list[str]]:
    """Return the rows of a table of scores, a column for each model, the heading first."""
    first = next(iter(columns.values()))
    rows = [["task", "metric", "n", *columns]]
    for number, score in enumerate(first):
        cells = [_text(scores[number]) for scores in columns.values()]
        rows.append([score.task, score.metric, str(score.examples), *cells])
    return rows


def _text(score: TaskScore) -> str:
    return f"{score.value:.3f}" + ("" if score.standard_error is None else f" ± {score.standard_error:.3f}")
