# SPDX-License-Identifier: Apache-2.0
"""What the callbacks that hold or train selected weights share: choosing, refusing, resuming, telling."""

from __future__ import annotations

import os
import time
import warnings
from abc import ABC, abstractmethod
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities import rank_zero_info
from torch import nn

from lightning_safety.callbacks.choice import GivenMask, Method, WeightChoice
from lightning_safety.callbacks.log import fill_callback_metrics, leaves_files, log_to_loggers
from lightning_safety.callbacks.resume import (
    CallbackWithRandomness,
    check_state_version,
    restores_late,
    warn_of_loaders_that_start_over,
)
from lightning_safety.callbacks.strategies import REPLICATED, check_start_method, check_strategy
from lightning_safety.callbacks.together import check_together, held_fraction, number_of_weights
from lightning_safety.language import find_language_model, find_tokenizer
from lightning_safety.processes import check_alike, together
from lightning_safety.randomness import capture_random_state
from lightning_safety.scoring import SafetyMask
from lightning_safety.scoring.expert_shares import expert_summary

_STATE_VERSION = 1


class SelectedWeightsCallback(CallbackWithRandomness, ABC):
    """Chooses weights at the start of a fit and does something with them until its end.

    All such callbacks of a trainer choose before the first of them acts, so that what they choose and every error is
    the same in any order. The arguments are those of `SafetyPreservingAdaptation`.

    Attributes:
        trains: Whether the selected weights are the only ones that train; else they are held.
        strategies: Those for several devices that are supported.
    """

    trains: bool
    strategies: tuple[str, ...] = REPLICATED

    def __init__(
        self,
        choice: WeightChoice,
        mask: SafetyMask | str | os.PathLike[str] | None,
        tokenizer: Any,
        language_model: str | None,
        save_mask: str | os.PathLike[str] | None,
    ) -> None:
        super().__init__()
        self.choice = choice
        self.tokenizer = tokenizer
        self.language_model = language_model
        self.save_mask = save_mask
        self._given = GivenMask(mask)
        self._mask: SafetyMask | None = None
        self._begin()

    def _begin(self) -> None:
        """Forget an earlier fit: another one is a new fit, and scores again."""
        self._mask = None
        self._model: nn.Module | None = None
        self._restored: dict[str, Any] | None = None
        self._similar_states: list[str] = []
        self._resumes = False
        self._seconds: float | None = None

    def _end(self) -> None:
        self.release()
        self._model = None

    @property
    def mask(self) -> SafetyMask | None:
        """The mask of the present or last fit; before the first, the one given."""
        return self._given.read() if self._mask is None else self._mask

    @property
    def _resumed(self) -> dict[str, Any]:
        """The state of the fit that is resumed; empty where none is, or its checkpoint has no such state."""
        return (self._restored if self._resumes else None) or {}

    @property
    def method(self) -> Method:
        """How the weights are chosen where no mask is given."""
        return self.choice.method

    @method.setter
    def method(self, method: Method) -> None:
        self.choice.method = method

    @property
    def state_key(self) -> str:
        """The name under which a checkpoint keeps the state: class, and what the weights are chosen by."""
        if self._given.name is not None:
            return self._generate_state_key(mask=self._given.name)
        chosen_by: dict[str, Any] = {"fraction": self.choice.fraction, "method": self.method}
        if self.method == "random":
            chosen_by["seed"] = self.choice.seed
        if self.choice.granularity != "weight":
            chosen_by["granularity"] = self.choice.granularity
        if self.choice.minus is not None:
            chosen_by["minus"] = self.choice.minus if isinstance(self.choice.minus, str) else "objective"
        return self._generate_state_key(**chosen_by)

    @abstractmethod
    def enforce(self, trainer: pl.Trainer, pl_module: pl.LightningModule, model: nn.Module, mask: SafetyMask) -> int:
        """Begin to act on the weights of `model` that `mask` selects, and return the memory that takes in bytes."""

    @abstractmethod
    def release(self) -> None:
        """Stop acting and leave no hook behind, whatever state the fit is in."""

    @abstractmethod
    def describe(self, count: str) -> str:
        """Return what happens to so many weights, for the line at the start of a fit."""

    # Hooks, in the order of a fit ---------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:  # noqa: ARG002
        """Refuse strategies that are not supported. Nothing happens outside a fit."""
        if stage == "fit":
            check_strategy(trainer, self, several=self.strategies)
            check_start_method(trainer, self)
            self._end()
            self._begin()

    def on_load_checkpoint(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        checkpoint: dict[str, Any],
    ) -> None:
        """Remember which states of such callbacks a checkpoint has, to name them where ours is missing."""
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        self._similar_states = [key for key in checkpoint["callbacks"] if key.startswith(type(self).__qualname__)]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until the fit starts; a checkpoint is also loaded for ``validate`` and ``test``."""
        check_state_version(self, state_dict, _STATE_VERSION)
        self._restored = state_dict

    def state_dict(self) -> dict[str, Any]:
        """Return the mask and the state of all random number generators: tensors and primitives."""
        if self._mask is None:
            return {}
        return {"version": _STATE_VERSION, "mask": self._mask.state_dict(), "random": capture_random_state()}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Choose the weights, unless a checkpoint says which, and begin to act on them."""
        if not restores_late(trainer):
            self._start(trainer, pl_module)
            self._randomness.at_fit_start(self._resumed.get("random"))

    def _start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        siblings = siblings_in(trainer)
        with together("Choosing weights"):
            for callback in siblings:
                callback._choose(trainer, pl_module)
        check_together(siblings)
        # Weights that a callback trains beside the base may be all that trains.
        trains = any(callback.trains for callback in siblings)
        if not trains and not any(parameter.requires_grad for parameter in pl_module.parameters()):
            raise ValueError(
                "The module expected to have weights to train but all are frozen (`requires_grad=False`), so there is"
                " nothing that could change. Unfreeze what should train."
            )
        assert self._model is not None
        assert self._mask is not None
        memory = self.enforce(trainer, pl_module, self._model, self._mask)
        rank_zero_info(self._summary(self._model, self._mask, memory))
        self._write_mask(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the fraction of the model's weights that is held, and take up the random numbers of a resumed fit."""
        if restores_late(trainer):
            self._start(trainer, pl_module)
        siblings = siblings_in(trainer)
        if self is siblings[0]:
            assert self._model is not None
            metrics = {"safety/held_fraction": held_fraction(siblings, self._model)}
            fill_callback_metrics(trainer, pl_module, metrics)
            log_to_loggers(trainer, metrics)
            if self._resumes:
                warn_of_loaders_that_start_over(trainer)
        self._randomness.at_train_start(trainer)

    def on_exception(
        self,
        trainer: pl.Trainer,  # noqa: ARG002
        pl_module: pl.LightningModule,  # noqa: ARG002
        exception: BaseException,  # noqa: ARG002
    ) -> None:
        """Leave no hook behind; Lightning calls no other hook after an error or Ctrl-C."""
        self._end()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:  # noqa: ARG002
        """Leave no hook behind."""
        self._end()

    # Choosing -----------------------------------------------------------------------------------------------------

    def _choose(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Settle model and mask, once a fit."""
        if self._mask is not None:
            return
        self._model = model = find_language_model(pl_module, self.language_model)
        self._resumes = trainer.ckpt_path is not None
        mask = self._resumed_mask() if self._resumes else self._given.read()
        if mask is None:
            started = time.perf_counter()
            mask = self.choice.mask(model, lambda: self._find_tokenizer(trainer), quick=not leaves_files(trainer))
            self._seconds = time.perf_counter() - started
        check_alike(mask.digest, "mask", "Give every process the same file, and the same model.")
        mask.check_model(model)
        if not mask.count:
            raise ValueError("`mask` expected to select weights but it selects none. Select some, or leave it out.")
        self._mask = mask

    def _resumed_mask(self) -> SafetyMask:
        """Return the mask of the fit that is resumed; the weights are trained by now, and must not be scored."""
        given = self._given.read()
        if self._restored is not None:
            mask = SafetyMask.from_state_dict(self._restored["mask"])
            if given is not None and given != mask:
                raise ValueError(
                    f"`mask` expected to be the one of the resumed fit but it selects other weights ({given} instead of"
                    f" {mask}). Leave the fit's own mask in place, or start a new fit from the checkpoint's weights."
                )
            return mask
        if given is None:
            found = f" It has {' and '.join(self._similar_states)}." if self._similar_states else ""
            raise ValueError(
                f"`mask` expected to be given: the checkpoint has no state of {self.state_key}.{found} Its weights are"
                " trained already, so scoring them would choose other weights than at the start. Pass `mask=` the mask"
                " to use, or the arguments of the callback that the checkpoint was made with."
            )
        warnings.warn(
            f"The checkpoint has no state of {self.state_key}. It {self.describe('the weights of `mask`')} from their"
            " values in the checkpoint on, and random numbers do not continue those of the fit that saved it.",
            stacklevel=2,
        )
        return given

    def _write_mask(self, trainer: pl.Trainer) -> None:
        assert self._mask is not None
        if self.save_mask is not None and leaves_files(trainer) and trainer.is_global_zero:
            self._mask.save(self.save_mask)

    def _find_tokenizer(self, trainer: pl.Trainer) -> Any:
        datamodule = getattr(trainer, "datamodule", None)
        return find_tokenizer(self.tokenizer, module=trainer.lightning_module, datamodule=datamodule, model=self._model)

    def _summary(self, model: nn.Module, mask: SafetyMask, memory: int) -> str:
        total = number_of_weights(model)
        size = f"{memory / 2**20:.1f} MiB" if memory >= 2**20 else f"{memory / 2**10:.1f} KiB"
        how = "drawn at random" if self.method == "random" else "scored"
        origin = f"{how} in {self._seconds:.1f} s" if self._seconds is not None else "mask given"
        if self._resumes:
            origin = "mask of the resumed fit" if self._restored is not None else origin
        experts = expert_summary(mask)
        return (
            f"{type(self).__name__}: {self.describe(f'{mask.count:,} weights')}, {100 * mask.fraction:.3g} % of"
            f" {mask.scored:,} scored and {100 * mask.count / total:.3g} % of all {total:,}; {size};"
            f" {origin}{f'; {experts}' if experts else ''}."
        )


def siblings_in(trainer: pl.Trainer) -> list[SelectedWeightsCallback]:
    """Return all such callbacks of a trainer, in its order."""
    return [callback for callback in trainer.callbacks if isinstance(callback, SelectedWeightsCallback)]  # type: ignore[attr-defined]
