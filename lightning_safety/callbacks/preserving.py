# SPDX-License-Identifier: Apache-2.0
"""Safety Preserving Adaptation: fine-tune on anything while safety-critical weights stand still."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
from torch import nn
from torch.optim import Optimizer

from lightning_safety.callbacks.choice import Method, WeightChoice
from lightning_safety.callbacks.selected import SelectedWeightsCallback
from lightning_safety.enforcement import HeldLora, WeightHolder
from lightning_safety.enforcement.adapters import adapter_rows, has_adapters
from lightning_safety.language import find_language_model
from lightning_safety.language.quantized import keep_unpacked
from lightning_safety.scoring import MixtureLayout, SafetyMask, SafetyObjective
from lightning_safety.scoring.neurons import Granularity

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class SafetyPreservingAdaptation(SelectedWeightsCallback):
    """Holds safety-critical weights still while everything else trains (SPA, arXiv 2604.08297).

    At the start of a fit it scores the model's weights by their Expected Safety Impact and holds the highest: they are
    bit-identical until the fit ends, whatever the optimizer, its decay and momentum, the precision, clipping and
    accumulation do, in automatic and manual optimization. Module, data and loss stay yours.

    A resumed fit holds the weights of the fit it resumes and scores nothing; its random numbers continue where the
    checkpoint was saved. Another ``fit`` with the same callback is a new fit and scores again, unless a mask is given.
    ``validate``, ``test`` and ``predict`` are left alone. Runs on a single device.

    Under LoRA, frozen or quantised base or not, the adapters' product is taken out where weights are held, so that the
    effective weight does not move. That stays part of the model after the fit: save it with `save_held_adapter`, merge
    it with `merge_held_adapter`. The adapters must add nothing when holding begins (peft's default initialisation).

    What it promises is that these weights do not move. Measure whether safety stays, with `HarmfulnessMonitor`.

    Args:
        fraction: Fraction of the scored weights to hold, in (0, 1]. Without effect where `mask` is given.
        mask: The weights to hold: a mask or its file. None: choose them at the start of the fit. After that, the
            attribute ``mask`` is the `SafetyMask`.
        objective: What safety means for the scores. Default: `RefusalMargin`.
        method: ``"top"``: the highest scores. ``"bottom"`` and ``"random"`` are controls.
        tokenizer: The tokenizer or its path, for the scores. Default: the module's or the data module's, or the one
            that lies beside the model's weights on disk.
        language_model: The dotted name of the language model in the module, where there are several.
        batch_size: Prompts in one pass while scoring. Changes memory and time only.
        seed: Seed of the random choice.
        include: Score only weights whose names match one of these shell-style patterns.
        exclude: Leave out those whose names match one of these.
        granularity: ``"weight"``: single weights. ``"neuron"``: whole rows of weights, by their mean score. Coarser,
            and free under LoRA: rows of B stay zero, and the adapter is an ordinary one for peft.
        mixture: Where the experts and routers of a mixture of experts are, if its family is not known.
        save_mask: File to write the mask to at the start of the fit.
        show_progress: Whether a bar shows the scoring where it takes over two seconds.

    Raises:
        ValueError: An argument is out of range. At the start of a fit: the mask does not fit the model, the strategy
            is not supported, all weights are frozen, the model has adapters and the mask selects no weight under them,
            or adapters that cannot be held, a selected weight is trained by a `SafetyEnhancementTuning` beside, or a
            checkpoint without a mask is resumed and none is given.
        TypeError: An argument is of the wrong type.

    Example:
        >>> import pytorch_lightning as pl
        >>> trainer = pl.Trainer(callbacks=[SafetyPreservingAdaptation(fraction=0.01)], accelerator="cpu", logger=False)
        >>> SafetyPreservingAdaptation(fraction=5)
        Traceback (most recent call last):
        ...
        ValueError: `fraction` expected to be in (0, 1] but got 5. For the top 5 %, pass `fraction=0.05`.
    """

    trains = False

    def __init__(
        self,
        fraction: float = 0.01,
        mask: SafetyMask | os.PathLike[str] | str | None = None,
        objective: SafetyObjective | None = None,
        *,
        method: Method = "top",
        tokenizer: PreTrainedTokenizerBase | str | None = None,
        language_model: str | None = None,
        batch_size: int = 8,
        seed: int = 0,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        granularity: Granularity = "weight",
        mixture: MixtureLayout | None = None,
        save_mask: os.PathLike[str] | str | None = None,
        show_progress: bool = True,
    ) -> None:
        choice = WeightChoice(
            fraction, objective, method, batch_size, seed, include, exclude, show_progress, granularity, mixture
        )
        super().__init__(choice, mask, tokenizer, language_model, save_mask)
        self._holders: list[WeightHolder] = []
        self._adapters: HeldLora | None = None
        self._batches = 0

    def describe(self, count: str) -> str:
        """Return what happens to so many weights."""
        return f"holds {count} still"

    def enforce(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,  # noqa: ARG002
        model: nn.Module,
        mask: SafetyMask,
    ) -> int:
        """Hold the weights from here on."""
        self._batches = 0
        self._holders = [WeightHolder(mask).attach(model, trainer.optimizers)]
        if not has_adapters(model):
            return self._holders[0].bytes
        keep_unpacked(model)
        if self.choice.granularity == "neuron":
            self._holders.append(WeightHolder(adapter_rows(model, mask)).attach(model, trainer.optimizers))
            return sum(holder.bytes for holder in self._holders)
        # A checkpoint of a fit that held these weights has adapters that were trained under it.
        self._adapters = HeldLora(mask).attach(model, continued=self._restored is not None and self._resumes)
        return self._holders[0].bytes + self._adapters.bytes

    def release(self) -> None:
        """Let go of the weights. What holds adapters stays: without it, they are another model."""
        for holder in self._holders:
            holder.release()
        self._holders, self._adapters = [], None

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Hold the adapters of a checkpoint that is validated, tested or used to predict."""
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        state = checkpoint["callbacks"].get(self.state_key)
        if trainer.state.fn == "fit" or not state or self.choice.granularity == "neuron":
            return
        model = find_language_model(pl_module, self.language_model)
        if has_adapters(model):
            HeldLora(SafetyMask.from_state_dict(state["mask"])).attach(model, continued=True)

    def on_before_optimizer_step(
        self,
        trainer: pl.Trainer,  # noqa: ARG002
        pl_module: pl.LightningModule,  # noqa: ARG002
        optimizer: Optimizer,  # noqa: ARG002
    ) -> None:
        """Take out what other callbacks have added to the gradients of held weights."""
        for holder in self._holders:
            holder.mask_gradients()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,  # noqa: ARG002
        pl_module: pl.LightningModule,  # noqa: ARG002
        outputs: Any,  # noqa: ARG002
        batch: Any,  # noqa: ARG002
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """Look whether something moves the weights that no hook sees, such as an optimizer Lightning does not know.

        Ever more rarely: after the first batch, the second, the fourth, the eighth and so on.
        """
        self._batches += 1
        if self._batches & (self._batches - 1):
            return
        self._check_adapters()
        moved = self._verify()
        if moved:
            raise RuntimeError(
                f"{moved:,} held weights were changed by something other than the trainer's optimizers. Return every"
                " optimizer from `configure_optimizers`, and change no held weight by hand."
            )

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """Make sure that the weights are what they were, also after other callbacks (averaging, for instance)."""
        self._check_adapters()
        moved = self._verify()
        if moved:
            for holder in self._holders:
                holder.restore()
            warnings.warn(
                f"{moved:,} held weights were changed during the fit by something other than the trainer's optimizers."
                " They have their values again, but checkpoints saved in between may not.",
                stacklevel=2,
            )

    def _verify(self) -> int:
        return sum(holder.verify() for holder in self._holders)

    def _check_adapters(self) -> None:
        if self._adapters is not None:
            self._adapters.check()
