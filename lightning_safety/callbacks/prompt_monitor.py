# SPDX-License-Identifier: Apache-2.0
"""What monitors that put prompts to the model share: the prompts, the model and its tokenizer."""

from __future__ import annotations

import hashlib
from abc import ABC
from collections.abc import Mapping
from typing import TYPE_CHECKING

import pytorch_lightning as pl

from lightning_safety.arguments import check_positive
from lightning_safety.callbacks.log import leaves_files
from lightning_safety.callbacks.monitor import SafetyMonitor
from lightning_safety.data import Example
from lightning_safety.language import find_language_model, find_tokenizer
from lightning_safety.monitoring import PromptSource, read_prompts
from lightning_safety.processes import check_alike, together

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

_FAST_DEV_RUN_PROMPTS = 2


class PromptMonitor(SafetyMonitor, ABC):
    """A monitor that puts prompts to the model.

    The prompts are read in ``setup``, and model and tokenizer looked for at the start of a fit: whatever is wrong with
    them stops the run before it trains.

    Args:
        every_n_steps: As for `SafetyMonitor`, like the next three.
        every_n_epochs: See there.
        at_start: See there.
        at_end: See there.
        sources: Where the prompts come from, by the name of the argument that says so.
        split: The split of built-in sets.
        prompts: At most so many of each kind; a ``fast_dev_run`` takes two. None: all.
        batch_size: Prompts at a time.
        allow_test: Whether the ``test`` split may be used.
        tokenizer: The tokenizer or its path; None: it is looked for.
        language_model: The dotted name of the language model in the module, where there are several.

    Raises:
        ValueError: An argument is out of range, or a split is ``test`` and may not be.
    """

    def __init__(
        self,
        every_n_steps: int | None,
        every_n_epochs: int | None,
        at_start: bool,
        at_end: bool,
        *,
        sources: dict[str, PromptSource],
        split: str,
        prompts: int | None,
        batch_size: int,
        allow_test: bool,
        tokenizer: str | PreTrainedTokenizerBase | None,
        language_model: str | None,
    ) -> None:
        super().__init__(every_n_steps, every_n_epochs, at_start, at_end)
        self.sources = sources
        self.split = split
        self.prompts = None if prompts is None else check_positive(prompts, "prompts")
        self.batch_size = check_positive(batch_size, "batch_size")
        self.tokenizer = tokenizer
        self.language_model = language_model
        self._examples: dict[str, list[Example]] = {}
        self._tokenizer: PreTrainedTokenizerBase | None = None
        splits = [source.get("split") for source in sources.values() if isinstance(source, Mapping)]
        if "test" in [split, *splits] and not allow_test:
            raise ValueError(
                "`split` expected to be for use during training but got 'test', which is kept for evaluation. "
                'Use split="monitor", or pass `allow_test=True`.'
            )

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Load the prompts, so that whatever is wrong with them stops the run before it begins."""
        super().setup(trainer, pl_module, stage)
        self._tokenizer = None
        limit = self.prompts if leaves_files(trainer) else _FAST_DEV_RUN_PROMPTS
        with together(f"Reading the prompts of {type(self).__name__}"):
            self._examples = {
                name: read_prompts(source, name, split=self.split, limit=limit)[1]
                for name, source in self.sources.items()
            }
            for name, examples in self._examples.items():
                # Processes share them out by their numbers.
                digest = hashlib.sha256(repr(examples).encode()).hexdigest()
                check_alike(digest, name, "Give every process the same prompts: copy the file to each machine.")

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find model and tokenizer, so that a missing one stops the run before anything is trained."""
        with together(f"Looking for the model and the tokenizer of {type(self).__name__}"):
            self._find(trainer, pl_module)

    def _find(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> tuple[nn.Module, PreTrainedTokenizerBase]:
        # The model each time, as a callback may replace it; the tokenizer, which may lie on disk, once.
        model = find_language_model(pl_module, self.language_model)
        if self._tokenizer is None:
            datamodule = getattr(trainer, "datamodule", None)
            self._tokenizer = find_tokenizer(self.tokenizer, module=pl_module, datamodule=datamodule, model=model)
        return model, self._tokenizer
