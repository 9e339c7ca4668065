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

from lightning_safety.arguments import check_positive
from lightning_safety.callbacks.choice import Method, Minus, WeightChoice
from lightning_safety.callbacks.gradient_edits import may_be_edited
from lightning_safety.callbacks.log import fill_callback_metrics, leaves_files, log_to_loggers
from lightning_safety.callbacks.planned_checks import last_step
from lightning_safety.callbacks.selected import SelectedWeightsCallback, siblings_in
from lightning_safety.callbacks.strategies import REPLICATED, SHARDED
from lightning_safety.callbacks.together import check_can_change
from lightning_safety.enforcement import HeldLora, WeightHolder
from lightning_safety.enforcement.adapters import adapter_rows, has_adapters
from lightning_safety.language import find_language_model
from lightning_safety.language.quantized import keep_unpacked
from lightning_safety.processes import check_alike, together
from lightning_safety.scoring import LeanScoring, MixtureLayout, SafetyMask, SafetyObjective
from lightning_safety.scoring.neurons import Granularity
from lightning_safety.scoring.shards import is_sharded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class SafetyPreservingAdaptation(SelectedWeightsCallback):
    """Holds safety-critical weights still while everything else trains (SPA, arXiv 2604.08297).

    At the start of a fit it scores the model's weights by their Expected Safety Impact and holds the highest: they are
    bit-identical until the fit ends, whatever the optimizer, its decay and momentum, the precision, clipping and
    accumulation do, in automatic and manual optimization. Module, data and loss stay yours.

    A resumed fit holds the weights of the fit it resumes and scores nothing; its random numbers continue where the
    checkpoint was saved. Another ``fit`` with the same callback is a new fit and scores again, unless a mask is given.
    ``validate``, ``test`` and ``predict`` are left alone. Runs on a single device and under DDP, where the processes
    share out the prompts to score; and, without adapters, under ``ModelParallelStrategy`` (FSDP2) with data parallelism
    alone, where it scores at the start of training, and each process its part of the weights.

    Under LoRA, frozen or quantised base or not, the adapters' product is taken out where weights are held, so that the
    effective weight does not move. That stays part of the model after the fit: save it with `save_held_adapter`, merge
    it with `merge_held_adapter`. The adapters must add nothing when holding begins (peft's default initialisation).

    What it promises is that these weights do not move. Measure whether safety stays, with `HarmfulnessMonitor`.

    What is critical moves as a model trains. With `rescore_every_n_steps` the model is scored again after so many
    optimizer steps: weights selected newly are held at their values of that moment, those selected no longer are let
    go. Logged is then ``safety/mask_kept``, the share of the weights held until then that are held on; of two random
    masks it would be `fraction`.

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
        lean: What scoring does to take less memory, for models that leave little beside them: `LeanScoring(passes=4)`.
        seed: Seed of the random choice.
        include: Score only weights whose names match one of these shell-style patterns.
        exclude: Leave out those whose names match one of these.
        granularity: ``"weight"``: single weights. ``"neuron"``: whole rows of weights, by their mean score. Coarser,
            and free under LoRA: rows of B stay zero, and the adapter is an ordinary one for peft.
        mixture: Where the experts and routers of a mixture of experts are, if its family is not known.
        minus: Select no weight that is among the highest `fraction` by another score. ``"utility"``: the likelihood of
            the written answers to the built-in `harmless` prompts; or an objective. As many weights are selected as
            without. The controls ``"bottom"`` and ``"random"`` do not heed it.
        rescore_every_n_steps: Choose anew after so many optimizer steps; a random choice is drawn anew. None: never.
            Not with `mask`, adapters, or a `SafetyEnhancementTuning` beside.
        save_mask: File to write the mask to at the start of the fit, and whenever it changes.
        show_progress: Whether a bar shows the scoring where it takes over two seconds.

    Raises:
        ValueError: An argument is out of range. At the start of a fit: the mask does not fit the model, the strategy
            is not supported, all weights are frozen, what `rescore_every_n_steps` cannot stand beside, the model has
            adapters and the mask selects no weight under them,
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
    strategies = (*REPLICATED, SHARDED)

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
        lean: LeanScoring = LeanScoring(),  # noqa: B008 # frozen
        seed: int = 0,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        granularity: Granularity = "weight",
        mixture: MixtureLayout | None = None,
        minus: Minus | SafetyObjective | None = None,
        rescore_every_n_steps: int | None = None,
        save_mask: os.PathLike[str] | str | None = None,
        show_progress: bool = True,
    ) -> None:
        options = (include, exclude, show_progress, granularity, mixture, minus, lean)
        choice = WeightChoice(fraction, objective, method, batch_size, seed, *options)
        if rescore_every_n_steps is not None:
            check_positive(rescore_every_n_steps, "rescore_every_n_steps")
            if mask is not None:
                raise ValueError(
                    "`rescore_every_n_steps` expected no `mask` beside it but got one: a mask that is given stays."
                    " Leave one of the two out."
                )
        self.rescore_every_n_steps = rescore_every_n_steps
        super().__init__(choice, mask, tokenizer, language_model, save_mask)
        self._holders: list[WeightHolder] = []
        self._adapters: HeldLora | None = None
        self._only_changed: bool | None = None
        self._batches = 0

    def _begin(self) -> None:
        super()._begin()
        self._chosen_at = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the mask, the step at which it was chosen, and the state of all random number generators."""
        state = super().state_dict()
        return state | {"chosen_at": self._chosen_at} if state else state

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
        self._only_changed = None
        self._chosen_at = self._resumed.get("chosen_at", 0) if self._resumed else trainer.global_step
        self._holders = [WeightHolder(mask).attach(model, trainer.optimizers)]
        if not has_adapters(model):
            return self._holders[0].bytes
        if is_sharded(model.parameters()):
            raise ValueError(
                "`strategy` expected not to shard a model with adapters beside SafetyPreservingAdaptation but it does."
                " Use DDP, or one device."
            )
        keep_unpacked(model)
        if self.choice.granularity == "neuron":
            self._holders.append(WeightHolder(adapter_rows(model, mask)).attach(model, trainer.optimizers))
            return sum(holder.bytes for holder in self._holders)
        # A checkpoint of a fit that held these weights has adapters that were trained under it.
        self._adapters = HeldLora(mask).attach(model, continued=bool(self._resumed))
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
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        optimizer: Optimizer,  # noqa: ARG002
    ) -> None:
        """Take out what other callbacks have added to the gradients of held weights."""
        if self._only_changed is None:
            self._only_changed = not may_be_edited(trainer, pl_module)
        for holder in self._holders:
            holder.mask_gradients(only_changed=self._only_changed)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,  # noqa: ARG002
        batch: Any,  # noqa: ARG002
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """Choose anew if it is time, and look whether something moves the weights that no hook sees.

        Such as an optimizer that Lightning does not know. Ever more rarely: after the first batch, the second, the
        fourth, the eighth and so on.
        """
        self._batches += 1
        if not self._batches & (self._batches - 1):
            self._check_nothing_moved()
        if self._is_due(trainer):
            self._check_nothing_moved()
            self._choose_anew(trainer, pl_module)

    def _choose(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._mask is None and self.rescore_every_n_steps is not None:
            check_can_change(trainer, siblings_in(trainer), find_language_model(pl_module, self.language_model))
        super()._choose(trainer, pl_module)

    def _is_due(self, trainer: pl.Trainer) -> bool:
        # Several optimizers count several steps a batch. After the last step nothing is left to hold.
        every, step = self.rescore_every_n_steps, trainer.global_step
        return every is not None and step // every > self._chosen_at // every and step < last_step(trainer)

    def _choose_anew(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self._model is not None
        assert self._mask is not None
        assert self.rescore_every_n_steps is not None
        # What holds weights still also takes their gradients away, which the scores are made of.
        self.release()
        before = self._mask
        with together("Choosing weights anew"):
            self._mask = self.choice.mask(
                self._model,
                lambda: self._find_tokenizer(trainer),
                quick=not leaves_files(trainer),
                number=trainer.global_step // self.rescore_every_n_steps,
            )
            check_alike(self._mask.digest, "mask", "Give every process the same prompts and the same model.")
        self._chosen_at = trainer.global_step
        self._holders = [WeightHolder(self._mask).attach(self._model, trainer.optimizers)]
        metrics = {"safety/mask_kept": before.overlap(self._mask) / before.count}
        fill_callback_metrics(trainer, pl_module, metrics)
        log_to_loggers(trainer, metrics)
        self._write_mask(trainer)

    def _check_nothing_moved(self) -> None:
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
