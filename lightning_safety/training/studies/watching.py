# SPDX-License-Identifier: Apache-2.0
"""Looking at a model in the middle of a fit: how safe it is, what it has learned, and what training has taken."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from lightning_safety.callbacks import SafetyReport
from lightning_safety.callbacks.monitor import SafetyMonitor
from lightning_safety.data import Example, known_answer_tasks
from lightning_safety.language import find_language_model, load_tokenizer
from lightning_safety.monitoring import (
    KeywordRefusalJudge,
    PromptSource,
    RefusalClassifier,
    exact_match,
    measure_harmfulness,
    perplexity,
    read_prompts,
)
from lightning_safety.monitoring.rates import finite_or_none
from lightning_safety.training.studies.cells import describe_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SECONDS_A_LOOK = 75.0
"""What a look takes for SmolLM2-135M-Instruct and 100 harmful prompts on two cores."""

_BATCH_SIZE = 32


@dataclass(frozen=True)
class Look:
    """Looks at models: rates by two judges, perplexity of written answers, and the share of tasks that are solved.

    Replies are judged and forgotten.

    Args:
        tokenizer: The models' tokenizer.
        harmful: Prompts that should be refused.
        borderline: Prompts that should not.
        answers: Harmless prompts with written answers.
        tasks: Prompts with one right answer each.
    """

    tokenizer: PreTrainedTokenizerBase
    harmful: Sequence[Example]
    borderline: Sequence[Example]
    answers: Sequence[Example]
    tasks: Sequence[Example]

    def __call__(self, model: nn.Module) -> dict[str, Any]:
        """Return what is seen of a causal language model, as JSON holds it; the model is left as it is."""
        found = measure_harmfulness(
            model,
            self.tokenizer,
            # Without their refusals: the margin takes time and is not asked for.
            [Example(example.prompt) for example in self.harmful],
            self.borderline,
            judges=[KeywordRefusalJudge(), RefusalClassifier()],
            batch_size=_BATCH_SIZE,
        )
        of_answers = perplexity(model, self.tokenizer, self.answers, batch_size=_BATCH_SIZE)
        solved = exact_match(model, self.tokenizer, self.tasks, batch_size=_BATCH_SIZE)
        for judge, rates in found.rates.items():
            print(f"{judge}: attack success {rates['attack_success_rate']}, over-refusal {rates['over_refusal_rate']}")
        rates_by_judge = {
            judge: {name: rate.to_dict() for name, rate in rates.items()} for judge, rates in found.rates.items()
        }
        return {"rates": rates_by_judge, "perplexity": of_answers.to_dict(), "exact_match": solved.to_dict()}

    @property
    def settings(self) -> dict[str, Any]:
        """What is looked with, as the file of a cell holds it."""
        sets = ("harmful", "borderline", "answers", "tasks")
        return {name: describe_rows(getattr(self, name)) for name in sets}


def make_look(source: str | os.PathLike[str], harmful: PromptSource, prompts: int, *, limit: int | None = None) -> Look:
    """Return what looks at a model with prompts that nothing was tuned on: the built-in ``test`` splits.

    Args:
        source: Where the tokenizer is.
        harmful: Prompts that should be refused: a built-in set (its ``test`` split), a file or a hub data set.
        prompts: At most so many of them, spread evenly.
        limit: At most so many borderline and harmless prompts, and tasks; None: all.
    """

    def read(source: PromptSource, name: str, count: int | None) -> list[Example]:
        return read_prompts(source, name, split="test", limit=count)[1]

    return Look(
        load_tokenizer(source),
        harmful=read(harmful, "harmful", prompts),
        borderline=read("borderline", "borderline", limit),
        answers=read("harmless", "harmless", limit),
        tasks=known_answer_tasks()[:limit],
    )


class LookingOn(pl.Callback):
    """Looks at the model after some optimizer steps, and counts the seconds of training without those of looking.

    Args:
        at: After which steps.
        look: Returns what is found of a model, such as a `Look`.
        start_share: How much of the start weights is mixed into the trained ones for the look, in [0, 1): a look at
            (1 − share) · W + share · W_start. The fit goes on with its own.

    Attributes:
        found: What was found, in order, each with ``step`` and ``training_seconds``.
    """

    def __init__(
        self, at: Sequence[int], look: Callable[[nn.Module], dict[str, Any]], start_share: float = 0.0
    ) -> None:
        self.at = tuple(at)
        self.look = look
        self.start_share = start_share
        self.found: list[dict[str, Any]] = []
        self._start: dict[str, Tensor] = {}
        self._started = self._spent = 0.0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:  # noqa: ARG002
        """Begin to count: what other callbacks do when the fit starts is part of what they take."""
        self._started = time.perf_counter()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """Keep the start weights, where the model is by now."""
        if self.start_share:
            model = find_language_model(pl_module)
            self._start = {n: weight.detach().clone() for n, weight in model.named_parameters() if weight.requires_grad}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Look, after a step that was asked for."""
        step = trainer.global_step
        if step not in self.at or any(entry["step"] == step for entry in self.found):
            return
        begun = time.perf_counter()
        model = find_language_model(pl_module)
        with self._mixed(model):
            found = self.look(model)
        metrics = {
            name: finite_or_none(float(value))
            for name, value in trainer.callback_metrics.items()
            if name.startswith("safety/")
        }
        seconds = begun - self._started - self._spent
        self.found.append({"step": step, "training_seconds": seconds, "metrics": metrics, **found})
        print(f"Looked after step {step}: {seconds:.0f} s of training so far.", flush=True)
        self._spent += time.perf_counter() - begun

    @contextmanager
    def _mixed(self, model: nn.Module) -> Iterator[None]:
        trained = {name: model.get_parameter(name).detach().clone() for name in self._start}
        with torch.no_grad():
            for name, start in self._start.items():
                model.get_parameter(name).lerp_(start, self.start_share)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, weight in trained.items():
                    model.get_parameter(name).copy_(weight)


def check_arms(arms: Mapping[str, Sequence[pl.Callback]], at: Sequence[int]) -> None:
    """Raise ValueError unless what a study compares can be fitted, looked at, and kept by its name.

    Args:
        arms: The callbacks of each, by name.
        at: After which optimizer steps to look.
    """
    for name, callbacks in arms.items():
        if "/" in name:
            raise ValueError(f"`arms` expected names without a slash but got {name!r}.")
        check_leave_no_files(callbacks)
    if not at or min(at) < 1:
        raise ValueError(f"`at` expected optimizer steps of at least 1 but got {at}. Pass for instance `[100]`.")


def check_leave_no_files(callbacks: Sequence[pl.Callback]) -> None:
    """Raise ValueError if a callback writes files, which may hold weights or replies of a model that is not safe."""
    for callback in callbacks:
        writes = [name for name in ("patch_file", "save_mask") if getattr(callback, name, None) is not None]
        if isinstance(callback, SafetyMonitor | SafetyReport | pl.callbacks.Checkpoint) or writes:
            raise ValueError(
                f"`callbacks` expected none that writes files but got {type(callback).__name__}"
                f"{f' with `{writes[0]}`' if writes else ''}. Leave that out: a study looks by itself, and keeps"
                " neither weights nor replies."
            )


def fit_and_look(
    make_module: Callable[[], pl.LightningModule],
    data: pl.LightningDataModule,
    callbacks: Sequence[pl.Callback],
    *,
    at: Sequence[int],
    look: Callable[[nn.Module], dict[str, Any]],
    precision: Any,
    seed: int,
    start_share: float = 0.0,
) -> tuple[pl.LightningModule, list[dict[str, Any]]]:
    """Fit a module in memory, look at it on the way, and leave nothing on disk.

    Args:
        make_module: Makes the module, after the seed is set.
        data: What it is trained on.
        callbacks: Copied: each fit has its own.
        at: After which optimizer steps to look; the last ends the fit.
        look: What is seen.
        precision: Lightning's.
        seed: Of everything that is drawn.
        start_share: As in `LookingOn`.

    Returns:
        The fitted module, and what `LookingOn` found.

    Raises:
        ValueError: A callback writes files, which may hold weights or replies of a model that is not safe.
        RuntimeError: A callback ended the fit early.
    """
    check_leave_no_files(callbacks)
    pl.seed_everything(seed, verbose=False)
    module = make_module()
    looking = LookingOn(at, look, start_share)
    trainer = pl.Trainer(
        max_steps=max(at),
        max_epochs=-1,
        devices=1,
        precision=precision,
        gradient_clip_val=1.0,
        # What callbacks have done at a step is looked at after it.
        callbacks=[*copy.deepcopy(list(callbacks)), looking],
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)
    if [entry["step"] for entry in looking.found] != sorted(set(at)):
        raise RuntimeError(
            f"The fit expected to be looked at after the steps {sorted(set(at))} but ended after step"
            f" {trainer.global_step}. Leave callbacks that end a fit out of the arm."
        )
    return module, looking.found
