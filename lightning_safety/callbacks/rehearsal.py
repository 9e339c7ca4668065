# SPDX-License-Identifier: Apache-2.0
"""Safety rehearsal: beside any task, a little of what keeps a model safe is learned again and again."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, cast

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_info
from torch.optim import Optimizer

from lightning_safety.callbacks.log import fill_callback_metrics, log_to_loggers
from lightning_safety.callbacks.rehearsal_need import LOOK_EVERY, RehearsalNeed
from lightning_safety.callbacks.resume import (
    CallbackWithRandomness,
    check_state_version,
    restores_late,
    warn_of_loaders_that_start_over,
    warn_of_lost_objective,
)
from lightning_safety.callbacks.scaling import autocast_of, gradient_scales
from lightning_safety.callbacks.strategies import REPLICATED, SHARDED, check_strategy
from lightning_safety.enforcement.optimizers import optimized_parameters, trains
from lightning_safety.enforcement.rehearsal import Rehearsal, RehearsalMode
from lightning_safety.language import find_language_model, find_tokenizer
from lightning_safety.language.quantized import keep_unpacked
from lightning_safety.monitoring import OwnReplies, PromptSource
from lightning_safety.randomness import capture_random_state, preserved_random_state
from lightning_safety.scoring import SafetyObjective

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

_STATE_VERSION = 1


class SafetyRehearsal(CallbackWithRandomness):
    """Keeps a model safe while it is fine-tuned, by rehearsing refusals and answers on a few examples now and then.

    Before an optimizer's step the gradient of a safety loss on a small rotating batch is mixed into the task's, after
    accumulation and before clipping. Module, data and loss stay yours. What is trainable learns: all weights, LoRA, or
    the weights that a `SafetyEnhancementTuning` selects; what a `SafetyPreservingAdaptation` holds stays held.

    Logged are, all under ``safety/``: ``rehearsal_loss`` (before the step, in nats per token), ``rehearsal_share``
    (rehearsals per optimizer step so far), ``rehearsal_seconds`` (what all took so far, the replies at the start and
    the looks too), with ``mode="project"`` ``rehearsal_conflicts`` (the share of rehearsals in which the task pointed
    against safety), and with ``every="adaptive"`` ``rehearsal_likelihood`` (how likely the own refusals last were).

    A resumed fit goes on in the rotation where the checkpoint was saved; on a single device it ends with the bits of
    one that was not interrupted. Runs on a single device, under DDP, and under ``ModelParallelStrategy`` (FSDP2) with
    data parallelism; every process takes the same examples. With manual optimization, your own clipping comes before.

    Measure with `HarmfulnessMonitor` whether safety stays: what is rehearsed are single sentences, no attack that was
    made to get around them, and a fine-tuner who wants harm leaves the callback out. Where harmful rows may be among
    the data, rehearse at fixed steps: ``"adaptive"`` let more of it go (``docs/preserving.md``).

    Args:
        every: Rehearse at every so many optimizer steps, from the first on. ``"adaptive"``: only when needed, after a
            look every `watch_every_n_steps` steps at how likely the model's own refusals are, without gradients, that
            finds them below their value at the start by more than `tolerance`.
        mode: ``"add"``: the gradient of the task's loss plus `weight` times the safety loss. ``"project"``: what in the
            task's gradient would raise the safety loss is taken out (A-GEM).
        objective: The safety loss. Default: `OwnReplies`, what the model itself refuses and answers when the fit
            starts, which takes some seconds of generation.
        weight: What the safety loss is multiplied by, with ``mode="add"``. Default: 3.
        batch_size: Examples in one rehearsal.
        watch_every_n_steps: With ``every="adaptive"``, after how many steps to look; twice as many after a rehearsal.
        tolerance: With ``every="adaptive"``, by how much the log-probability of a refusal's first four tokens may
            fall below its start, in nats per token.
        watch: Harmful prompts for that look: a built-in set (its split ``monitor``), a file, or a mapping of what
            `load_prompts` takes. Those count that the model refuses at the start.
        watch_prompts: At most so many of them.
        tokenizer: The tokenizer or its path. Default: the module's, the data module's, or the one beside the weights.
        language_model: The dotted name of the language model in the module, where there are several.
        seed: Of the order in which the examples come round.

    Raises:
        ValueError: An argument is out of range. At the start of a fit: the objective has no examples, or no optimizer
            trains the language model.
        TypeError: An argument is of the wrong type.
        RuntimeError: While training: the safety loss or its gradient is not finite; the step is not taken.

    Example:
        >>> import pytorch_lightning as pl
        >>> trainer = pl.Trainer(callbacks=[SafetyRehearsal(every=4)], accelerator="cpu", logger=False)
        >>> SafetyRehearsal(every=0)
        Traceback (most recent call last):
        ...
        ValueError: `every` expected to be a whole number of at least 1 or 'adaptive' but got 0.
    """

    def __init__(
        self,
        every: int | Literal["adaptive"] = 4,
        mode: RehearsalMode = "add",
        objective: SafetyObjective | None = None,
        *,
        weight: float | None = None,
        batch_size: int = 4,
        watch_every_n_steps: int = LOOK_EVERY,
        tolerance: float = 0.0,
        watch: PromptSource = "harmful",
        watch_prompts: int = 8,
        tokenizer: PreTrainedTokenizerBase | str | None = None,
        language_model: str | None = None,
        seed: int = 0,
    ) -> None:
        if every != "adaptive" and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
            raise ValueError(f"`every` expected to be a whole number of at least 1 or 'adaptive' but got {every!r}.")
        super().__init__()
        self.every = every
        self.rehearsal = Rehearsal(
            objective or OwnReplies(), mode=mode, weight=weight, batch_size=batch_size, seed=seed
        )
        self.need = RehearsalNeed(watch_every_n_steps, tolerance, watch, watch_prompts) if every == "adaptive" else None
        self.tokenizer = tokenizer
        self.language_model = language_model
        self._begin()

    def _begin(self) -> None:
        self._restored: dict[str, Any] | None = None
        self._model: nn.Module | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._steps: dict[int, int] = {}
        self._rehearsals = 0
        self._conflicts = 0
        self._seconds = 0.0
        self._loss: float | None = None
        if self.need is not None:
            self.need.forget()

    @property
    def metrics(self) -> dict[str, float]:
        """What is logged, by full name, as of the last step; empty before the first step."""
        steps = sum(self._steps.values())
        if not steps:
            return {}
        found = {"rehearsal_share": self._rehearsals / steps, "rehearsal_seconds": self._seconds}
        if self._loss is not None:
            found["rehearsal_loss"] = self._loss
        if self.rehearsal.mode == "project" and self._rehearsals:
            found["rehearsal_conflicts"] = self._conflicts / self._rehearsals
        if self.need is not None and self.need.likelihood is not None:
            found["rehearsal_likelihood"] = self.need.likelihood
        return {f"safety/{name}": value for name, value in found.items()}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:  # noqa: ARG002
        """Refuse strategies that are not supported, and forget an earlier fit."""
        if stage == "fit":
            check_strategy(trainer, self, several=(*REPLICATED, SHARDED))
            self._begin()

    def state_dict(self) -> dict[str, Any]:
        """Return the place in the rotation, what was done so far, and the state of all random number generators."""
        return {
            "version": _STATE_VERSION,
            "steps": dict(self._steps),
            "rehearsals": self._rehearsals,
            "conflicts": self._conflicts,
            "seconds": self._seconds,
            "objective": self.rehearsal.objective.state_dict(),
            "need": None if self.need is None else self.need.state_dict(),
            "random": capture_random_state(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until the fit starts; a checkpoint is also loaded for ``validate`` and ``test``."""
        check_state_version(self, state_dict, _STATE_VERSION)
        self._restored = state_dict

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Read the examples, so that whatever is wrong with them stops the run before it trains."""
        model = find_language_model(pl_module, self.language_model)
        datamodule = getattr(trainer, "datamodule", None)
        tokenizer = find_tokenizer(self.tokenizer, module=pl_module, datamodule=datamodule, model=model)
        keep_unpacked(model)
        self._model, self._tokenizer = model, tokenizer
        # Strategies that shard the model restore it later; before that it may be any.
        if not restores_late(trainer):
            self._prepare(trainer)
            self._randomness.at_fit_start(self._restored["random"] if self._restored else None)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take up where a checkpoint left, and look how safe the model is."""
        if restores_late(trainer):
            self._prepare(trainer)
        warn_of_lost_objective(trainer, self, self.rehearsal.objective, (self._restored or {}).get("objective"))
        if self._restored is not None:
            self._steps = dict(self._restored["steps"])
            self._rehearsals, self._conflicts = self._restored["rehearsals"], self._restored["conflicts"]
            self._seconds += self._restored["seconds"]
            warn_of_loaders_that_start_over(trainer)
        assert self._model is not None
        if not any(trains(optimizer, self._model, pl_module) for optimizer in trainer.optimizers):
            raise ValueError(
                "`language_model` expected to be trained by an optimizer but none holds a trainable weight of"
                f" {type(self._model).__name__}, so that a rehearsal would change nothing. Unfreeze some of its"
                " weights and return them from `configure_optimizers`, or leave the callback out."
            )
        if self.need is not None:
            assert self._tokenizer is not None
            with self._preparing(trainer):
                self.need.begin(trainer, self._model, self._tokenizer, self._restored and self._restored["need"])
        self._randomness.at_train_start(trainer)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Rehearse, if it is time."""
        assert self._model is not None
        if not trains(optimizer, self._model, pl_module):
            return
        number = trainer.optimizers.index(optimizer)
        self._steps[number] = self._steps.get(number, 0) + 1
        if self._is_due(trainer, number):
            self._rehearse(trainer, optimizer)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,  # noqa: ARG002
        pl_module: pl.LightningModule,
        outputs: Any,  # noqa: ARG002
        batch: Any,  # noqa: ARG002
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """Log what was done so far."""
        if metrics := self.metrics:
            pl_module.log_dict(metrics, on_step=True, on_epoch=False, batch_size=1, rank_zero_only=True)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say what it came to."""
        fill_callback_metrics(trainer, pl_module, self.metrics, hook_may_log=False)
        log_to_loggers(trainer, self.metrics)
        rank_zero_info(
            f"SafetyRehearsal: {self._rehearsals} rehearsals in {sum(self._steps.values())} optimizer steps,"
            f" {self._seconds:.1f} s."
        )

    def _prepare(self, trainer: pl.Trainer) -> None:
        assert self._model is not None
        assert self._tokenizer is not None
        every = self.every if isinstance(self.every, int) else cast(RehearsalNeed, self.need).every_n_steps
        # Asking for the length of an epoch would set the data up, and draw random numbers, too early.
        examples = math.ceil(trainer.max_steps / every) * self.rehearsal.batch_size
        self.rehearsal.objective.expect(examples if trainer.max_steps > 0 else None)
        with self._preparing(trainer):
            if self.need is not None:
                self.need.prepare(self.rehearsal.objective)
            self.rehearsal.prepare(self._model, self._tokenizer, self._restored and self._restored["objective"])

    def _is_due(self, trainer: pl.Trainer, optimizer: int) -> bool:
        if isinstance(self.every, int):
            return (self._steps[optimizer] - 1) % self.every == 0
        assert self._model is not None
        assert self.need is not None
        if self.need.looks_before_step_of(optimizer):
            with self._timed():
                self.need.look(trainer, self._model)
        return self.need.rehearses_before_step_of(optimizer)

    def _rehearse(self, trainer: pl.Trainer, optimizer: Optimizer) -> None:
        assert self._model is not None
        loss_scale, gradient_scale = gradient_scales(trainer, optimizer)
        with self._timed():
            done = self.rehearsal.mix(
                self._model,
                optimized_parameters(optimizer),
                self._rehearsals,
                beside=[vector for other in trainer.optimizers for vector in optimized_parameters(other)],
                gradient_scale=gradient_scale,
                loss_scale=loss_scale,
                forward_context=trainer.precision_plugin.train_step_context,
            )
        self._rehearsals += 1
        self._conflicts += bool(done.conflict)
        self._loss = done.loss

    @contextmanager
    def _preparing(self, trainer: pl.Trainer) -> Iterator[None]:
        # What is kept is what the model says in the precision that it trains in; its weights have theirs already.
        with preserved_random_state(), self._timed(), autocast_of(trainer):
            yield

    @contextmanager
    def _timed(self) -> Iterator[None]:
        assert self._model is not None
        if next(self._model.parameters()).is_cuda:
            # What the task has still to do is not the rehearsal's time.
            torch.cuda.synchronize()
        started = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - started
