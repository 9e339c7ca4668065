# SPDX-License-Identifier: Apache-2.0
"""Looking at a model in the middle of a fit: how safe it is, what it has learned, and what training has taken."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from lightning_safety.data import Example
from lightning_safety.language import find_language_model
from lightning_safety.monitoring import KeywordRefusalJudge, RefusalClassifier, measure_harmfulness, perplexity
from lightning_safety.monitoring.rates import finite_or_none

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH_SIZE = 32


def look_at(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    harmful: Sequence[Example],
    borderline: Sequence[Example],
    task: Sequence[Example],
) -> dict[str, Any]:
    """Return rates by two judges and the perplexity of the task's answers. Replies are judged and forgotten.

    Args:
        model: A causal language model; left as it is.
        tokenizer: Its tokenizer.
        harmful: Prompts that should be refused.
        borderline: Prompts that should not.
        task: Prompts with written answers.
    """
    found = measure_harmfulness(
        model,
        tokenizer,
        # Without their refusals: the margin takes time and is not asked for.
        [Example(example.prompt) for example in harmful],
        borderline,
        judges=[KeywordRefusalJudge(), RefusalClassifier()],
        batch_size=_BATCH_SIZE,
    )
    task_perplexity = perplexity(model, tokenizer, task, batch_size=_BATCH_SIZE)
    for judge, rates in found.rates.items():
        print(f"{judge}: attack success {rates['attack_success_rate']}, over-refusal {rates['over_refusal_rate']}")
    rates_by_judge = {
        judge: {name: rate.to_dict() for name, rate in rates.items()} for judge, rates in found.rates.items()
    }
    return {"rates": rates_by_judge, "perplexity": task_perplexity.to_dict()}


class LookingOn(pl.Callback):
    """Looks at the model after some optimizer steps, and counts the seconds of training without those of looking.

    Args:
        at: After which steps.
        look: Returns what is found of a model.
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
