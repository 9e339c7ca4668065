# SPDX-License-Identifier: Apache-2.0
"""A module around a language model whose checkpoints are enough to resume from, and to make a model of."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch

from lightning_safety.callbacks.resume import ResumedRandomness, of_all_processes
from lightning_safety.language import canonical_name
from lightning_safety.randomness import capture_random_state
from lightning_safety.training.adapters import (
    adapters_off,
    base_names,
    check_base,
    check_loaded,
    check_off_is_start,
    is_peft_model,
    sample_base,
)
from lightning_safety.training.checkpoint import (
    ADAPTERS_KEY,
    ADAPTERS_VERSION,
    FILES_KEY,
    RANDOM_KEY,
    check_version,
    pack_files,
)
from lightning_safety.training.counters import correct_at_fit_start
from lightning_safety.training.interventions import describe_interventions, restore_interventions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class ResumableLanguageModule(pl.LightningModule):
    """Holds a language model, with or without adapters, and the model that the fit starts from.

    Its checkpoints hold configuration and tokenizer, from which `export_checkpoint` makes a model, and the random
    state, so that a fit with dropout resumes exactly. Of a model with adapters they hold what trains and not the base.

    Args:
        model: A causal language model, or a `PeftModel` around one.
        tokenizer: Its tokenizer.
        keeps_start: Whether `start_model` will be asked for. With adapters that is the model without them, else a copy.

    Raises:
        ValueError: The start model cannot be told from the adapters.
    """

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, *, keeps_start: bool) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self._base_sample = sample_base(model) if is_peft_model(model) else None
        # In a tuple it is no submodule: the module holds one language model, and checkpoints hold one copy.
        self._start_model: tuple[PreTrainedModel, ...] = ()
        self._keeps_start = keeps_start
        if keeps_start and self._base_sample is not None:
            check_off_is_start(model, begun=False)
        elif keeps_start:
            self._start_model = (copy.deepcopy(model).eval().requires_grad_(False),)
        self._randomness = ResumedRandomness()
        self._random_state: dict[str, Any] | list[dict[str, Any]] | None = None

    @property
    def language_model(self) -> PreTrainedModel:
        """The causal language model, with LoRA layers inside where there are adapters."""
        model: PreTrainedModel = self.model if self._base_sample is None else self.model.get_base_model()
        return model

    @contextmanager
    def start_model(self, device: torch.device) -> Iterator[PreTrainedModel]:
        """Give the model that the fit started from, for a forward pass inside the context."""
        if self._start_model:
            # Lightning moves submodules only.
            yield self._start_model[0].to(device)
            return
        with adapters_off(self.model):
            yield self.language_model

    def on_fit_start(self) -> None:
        """Take up the random numbers of a resumed fit, which dropout draws from."""
        if self._keeps_start and self._base_sample is not None:
            check_off_is_start(self.model, begun=True)
        resumes = self.trainer.ckpt_path is not None
        self._randomness.at_fit_start(self._random_state if resumes else None)

    def on_train_start(self) -> None:
        """Correct Lightning's count of epochs after a resume."""
        correct_at_fit_start(self.trainer)
        self._randomness.at_train_start(self.trainer)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what `export_checkpoint` and a resumed fit need; of a model with adapters, take out the base."""
        checkpoint[FILES_KEY] = pack_files(self.model, self.tokenizer)
        checkpoint[RANDOM_KEY] = of_all_processes(capture_random_state(), self.trainer)
        if self._base_sample is not None:
            left_out, weights = base_names(self), checkpoint["state_dict"]
            checkpoint["state_dict"] = {name: weights[name] for name in weights if name not in left_out}
            base = {canonical_name(name) for name in base_names(self.model)}
            checkpoint[ADAPTERS_KEY] = {
                "version": ADAPTERS_VERSION,
                "active": list(self.model.active_adapters),
                "base": self._base_sample,
                **describe_interventions(self._trainer, self.model, base, checkpoint.get("callbacks", {})),
            }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make sure that adapters come to the base they were trained on, and do to it what callbacks had done.

        Raises:
            ValueError: The base is another one, the module has no adapters, or the checkpoint is of a newer version.
        """
        self._random_state = checkpoint.get(RANDOM_KEY)
        if ADAPTERS_KEY in checkpoint:
            described = check_version(checkpoint[ADAPTERS_KEY])
            check_base(self._base_sample, described["base"])
            restore_interventions(self.model, described, checkpoint.get("callbacks", {}))

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights; those of a module with adapters may lack the base, and nothing else.

        Raises:
            RuntimeError: Shapes differ, or, without adapters, names.
            ValueError: Something else is missing, or has no place.
        """
        result = super().load_state_dict(state_dict, strict=strict and self._base_sample is None, assign=assign)
        if strict and self._base_sample is not None:
            check_loaded(result, base_names(self))
            result.missing_keys.clear()
        return result
