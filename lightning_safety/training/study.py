# SPDX-License-Identifier: Apache-2.0
"""A study: evaluate, fit, evaluate again, and the same with a random mask beside it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import pytorch_lightning as pl

from lightning_safety.callbacks import SafetyEnhancementTuning
from lightning_safety.callbacks.selected import SelectedWeightsCallback
from lightning_safety.files import replace_atomically
from lightning_safety.language import find_language_model, find_tokenizer
from lightning_safety.monitoring import SafetyEvaluation, comparison_table, evaluate_safety


class Experiment(Protocol):
    """What a fit needs; a ``LightningCLI`` is one."""

    trainer: pl.Trainer
    model: pl.LightningModule
    datamodule: pl.LightningDataModule


def run_study(
    experiment: Experiment,
    make_control: Callable[[], Experiment] | None = None,
    *,
    output: Path,
    limit: int | None = None,
    max_new_tokens: int = 24,
    batch_size: int = 16,
) -> dict[str, SafetyEvaluation]:
    """Evaluate, fit and evaluate again on the built-in ``test`` splits, and write one run folder.

    The folder holds ``results.json``, the replies (readable by their owner alone), Lightning's logs and, for each
    callback that chooses weights, ``mask.safetensors``, its heat map and, after SET, ``patch.safetensors``; those of
    the control begin with ``random-``.

    Args:
        experiment: Trainer, module and data; a callback of ours among the trainer's decides what is held or trained.
        make_control: Makes the experiment anew, start model and all; it is then fitted with a random mask. None: no
            control.
        output: The run folder.
        limit: At most so many prompts of each set; None: all.
        max_new_tokens: Length of a judged reply, in tokens.
        batch_size: Replies generated at a time.

    Returns:
        The evaluations by column: ``before``, ``after`` and, with a control, ``random mask``.

    Raises:
        ValueError: A control was asked for, but no callback chooses weights that could be random instead.
    """
    callbacks = _weight_callbacks(experiment.trainer)
    source = str(getattr(find_language_model(experiment.model), "name_or_path", "") or "MODEL")
    if make_control is not None and not any(callback.mask is None for callback in callbacks):
        raise ValueError(
            "`control` expected a trainer with SafetyEnhancementTuning or SafetyPreservingAdaptation that scores (no "
            "`mask=`), but there is none. Add the callback, or leave `control` out."
        )
    settings: dict[str, Any] = {"limit": limit, "max_new_tokens": max_new_tokens, "batch_size": batch_size}
    columns = {"before": _evaluate(experiment, settings)}
    settings["own_replies"] = columns["before"].own_replies
    experiment.trainer.fit(experiment.model, datamodule=experiment.datamodule)
    # What took long to make is on disk before anything else can fail.
    _save_weights(callbacks, output)
    columns["after"] = _evaluate(experiment, settings)
    _write_results(columns, output)
    if make_control is not None:
        del experiment
        control = make_control()
        drawn = [callback for callback in _weight_callbacks(control.trainer) if callback.mask is None]
        for callback in drawn:
            callback.method = "random"
        control.trainer.fit(control.model, datamodule=control.datamodule)
        _save_weights(drawn, output, "random-")
        columns["random mask"] = _evaluate(control, settings)
        _write_results(columns, output)
    print("\n\n".join([comparison_table(columns), *_describe_weights(callbacks), _next_step(source, output)]))
    return columns


def _weight_callbacks(trainer: pl.Trainer) -> list[SelectedWeightsCallback]:
    return [callback for callback in trainer.callbacks if isinstance(callback, SelectedWeightsCallback)]  # type: ignore[attr-defined]


def _evaluate(experiment: Experiment, settings: dict[str, Any]) -> SafetyEvaluation:
    model = find_language_model(experiment.model)
    tokenizer = find_tokenizer(module=experiment.model, datamodule=experiment.datamodule, model=model)
    return evaluate_safety(model, tokenizer, split="test", **settings)


def _save_weights(callbacks: list[SelectedWeightsCallback], output: Path, prefix: str = "") -> None:
    for number, callback in enumerate(callbacks):
        # One callback is the rule; names must not collide where there are two.
        suffix = f"-{number + 1}" if len(callbacks) > 1 else ""
        if callback.mask is not None:
            callback.mask.save(output / f"{prefix}mask{suffix}.safetensors")
            callback.mask.describe().heatmap(output / f"{prefix}mask{suffix}.png")
        if isinstance(callback, SafetyEnhancementTuning) and callback.patch is not None:
            callback.patch.save(output / f"{prefix}patch{suffix}.safetensors")


def _write_results(columns: dict[str, SafetyEvaluation], output: Path) -> None:
    for name, column in columns.items():
        column.write_replies(output / f"replies-{name.replace(' ', '-')}.jsonl")
    results = {name: column.to_dict() for name, column in columns.items()}
    with replace_atomically(output / "results.json") as temporary:
        temporary.write_text(json.dumps(results, indent=2), encoding="utf-8")


def _describe_weights(callbacks: list[SelectedWeightsCallback]) -> list[str]:
    return [callback.mask.describe().table() for callback in callbacks if callback.mask is not None]


def _next_step(source: str, output: Path) -> str:
    """Return the last line: how to apply the patch, or where everything is."""
    patches = sorted(output.glob("patch*.safetensors"))
    if not patches:
        return f"Everything is in {output}"
    command = f"lightning-safety patch apply {source} {patches[0]} -o FOLDER"
    return f"Everything is in {output}; to apply the patch: {command}"
