# SPDX-License-Identifier: Apache-2.0
"""Safety Enhancement Tuning: train safety-critical weights and nothing else."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from lightning_safety.arguments import check_positive
from lightning_safety.callbacks.choice import Method, Minus, WeightChoice
from lightning_safety.callbacks.log import leaves_files
from lightning_safety.callbacks.selected import SelectedWeightsCallback
from lightning_safety.enforcement import AveragedWeights, CompactTraining, SafetyPatch, SparseDelta, snapshot_entries
from lightning_safety.enforcement.replicas import WithoutExchange
from lightning_safety.enforcement.sparse_delta import needs_sparse_delta
from lightning_safety.language import find_language_model
from lightning_safety.scoring import LeanScoring, MixtureLayout, SafetyMask, SafetyObjective

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_NAMES_SHOWN = 3


class SafetyEnhancementTuning(SelectedWeightsCallback):
    """Trains safety-critical weights only; everything else stays bit-identical (SET, arXiv 2604.08297).

    At the start of a fit it scores the model's weights by their Expected Safety Impact, and the optimizers then hold
    nothing but the highest. It says *which weights* train; data and loss stay the module's, so give it what the model
    should learn: refusals to harmful prompts, and helpful answers besides, or it learns to refuse everything.

    Gradients and optimizer state take memory for selected weights only; `parameter.grad` of the model is always None,
    so clip with ``Trainer(gradient_clip_val=…)`` or ``self.clip_gradients``. Parameters outside the language model
    stand still too. Optimizers must treat every weight by itself, as AdamW, SGD and Lion do; 8-bit ones, Muon and
    Adafactor are refused.

    Where all selected weights are frozen, under LoRA for instance, or one is quantised, they are trained beside the
    base (`SparseDelta`), in float32, by the one optimizer; adapters stand still. A frozen base holds them after every
    step. What they differ by from a quantised one acts on it, also after the fit, and the patch fits the dequantised
    model; another fit with the same mask goes on from there. No ``state_dict`` holds that difference but the callback's
    own: test such a checkpoint with the callback in the trainer.

    A resumed fit trains the weights of the fit it resumes and scores nothing; its random numbers continue where the
    checkpoint was saved. Another ``fit`` with the same callback is a new fit and scores again, unless a mask is given.
    ``validate``, ``test`` and ``predict`` see the trained model. Runs on a single device and, where the base trains,
    under DDP: the processes share out the prompts to score, and exchange gradients of selected weights only. Every
    backward pass must reach some of these in every process.

    Args:
        fraction: Fraction of the scored weights to train, in (0, 1]. Without effect where `mask` is given.
        mask: The weights to train: a mask or its file. None: choose them at the start of the fit. After that, the
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
        mixture: Where the experts and routers of a mixture of experts are, if its family is not known.
        minus: Train no weight that another score ranks as high: as for `SafetyPreservingAdaptation`.
        save_mask: File to write the mask to at the start of the fit.
        show_progress: Whether a bar shows the scoring where it takes over two seconds.
        average_last: The fit ends with the mean of the weights after each of its last so many optimizer steps. Give the
            optimizer a learning rate that does not fall, and the trainer `max_steps`. Where a model stands between
            refusing and answering changes from step to step, less so in the mean. None: no mean.
        patch: File to write the `SafetyPatch` to at the end of the fit: what turns the model from before the fit into
            the one after. The attribute ``patch`` is the patch itself.

    Raises:
        ValueError: An argument is out of range. At the start of a fit: the mask does not fit the model, the strategy or
            an optimizer is not supported, some selected weights are frozen and others not, one is in no optimizer or
            held by a `SafetyPreservingAdaptation` beside, one of a frozen or quantised base is not that of a linear
            layer, or a checkpoint without a mask is resumed and none is given.
        TypeError: An argument is of the wrong type.
    """

    trains = True

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
        mixture: MixtureLayout | None = None,
        minus: Minus | SafetyObjective | None = None,
        save_mask: os.PathLike[str] | str | None = None,
        show_progress: bool = True,
        average_last: int | None = None,
        patch: os.PathLike[str] | str | None = None,
    ) -> None:
        options: Any = {"mixture": mixture, "minus": minus, "lean": lean}
        choice = WeightChoice(fraction, objective, method, batch_size, seed, include, exclude, show_progress, **options)
        super().__init__(choice, mask, tokenizer, language_model, save_mask)
        self.average_last = None if average_last is None else check_positive(average_last, "average_last")
        self.patch_file = patch
        self._training: CompactTraining | SparseDelta | None = None
        self._handles: list[RemovableHandle | WithoutExchange] = []
        self._last_step = 0

    def _begin(self) -> None:
        super()._begin()
        self._before: dict[str, Tensor] = {}
        # What a base that does not train, or an adapter's checkpoint, may not hold.
        self._trained: dict[str, Tensor] | None = None
        self._patch: SafetyPatch | None = None
        self._average: AveragedWeights | None = None

    @property
    def patch(self) -> SafetyPatch | None:
        """What the last fit changed; None before its end."""
        return self._patch

    def describe(self, count: str) -> str:
        """Return what happens to so many weights."""
        return f"trains {count} and nothing else"

    def enforce(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,  # noqa: ARG002
        model: nn.Module,
        mask: SafetyMask,
    ) -> int:
        """Put the weights into the optimizers in place of the model's parameters."""
        if self.average_last is not None and trainer.max_steps < 1:
            raise ValueError(
                f"`average_last={self.average_last}` expected a trainer with `max_steps`, which says when the last"
                f" steps begin, but it is {trainer.max_steps}. Set it."
            )
        restored = (self._restored if self._resumes else None) or {}
        sparse = needs_sparse_delta(model, mask)
        if restored and sparse != ("trained" in restored):
            raise ValueError(
                "`ckpt_path` expected to be a checkpoint of a fit whose base was frozen or quantised alike, but the"
                f" selected weights {'were trained in the model' if sparse else 'were frozen or quantised'} there."
                " Freeze and load the model as that fit did, or start a new fit from the weights."
            )
        several = trainer.world_size > 1
        if sparse and several:
            raise ValueError(
                f"`strategy` expected to run in one process where the base is frozen or quantised but"
                f" {type(trainer.strategy).__name__} runs {trainer.world_size}. Pass `Trainer(devices=1,"
                ' strategy="auto")`, or unfreeze the selected weights.'
            )
        if sparse:
            self._training = SparseDelta(mask).attach(
                model, trainer.optimizers, trained=restored.get("trained"), before=restored.get("before")
            )
            self._before = self._training.before
        else:
            self._before = snapshot_entries(model, mask) if not restored else restored["before"]
            self._training = CompactTraining(mask, replicated=several).attach(model, trainer.optimizers)
        # Also around a single process.
        if isinstance(trainer.strategy.model, DistributedDataParallel):
            self._handles.append(WithoutExchange(trainer.strategy.model))
        if self.average_last is not None:
            self._last_step = trainer.max_steps
            # After those of the training itself, so that the weights are those after the step.
            self._handles += [
                optimizer.register_step_post_hook(partial(self._average_step, trainer))
                for optimizer in trainer.optimizers
            ]
        return self._training.bytes

    def _average_step(self, trainer: pl.Trainer, *_: Any) -> None:
        """Take a step into the mean: inside of the step, so that whoever looks after the last one sees the mean."""
        if self._average is None or self.average_last is None:
            return
        step = trainer.global_step + 1
        if step > self._last_step - self.average_last:
            self._average.add()
        if step == self._last_step:
            self._average.settle()

    def release(self) -> None:
        """Stop training; the model is the trained one."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if isinstance(self._training, SparseDelta):
            self._trained = {name: values.cpu() for name, values in self._training.entries().items()}
            self._training.settle()
        elif self._training is not None:
            self._training.release()
        self._training = None

    def state_dict(self) -> dict[str, Any]:
        """Return the mask, what is needed to go on and to make the patch, and the state of all random generators."""
        state = super().state_dict()
        if not state:
            return state
        average = {} if self._average is None else {"average": self._average.state_dict()}
        trained = self._training.entries() if isinstance(self._training, SparseDelta) else self._trained
        beside = {} if trained is None else {"trained": {name: values.cpu() for name, values in trained.items()}}
        return {**state, "before": dict(self._before), **beside, **average}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Refuse the optimizer state of a fit that trained whole tensors. To test, make the model the trained one."""
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        state = checkpoint["callbacks"].get(self.state_key)
        if trainer.state.fn != "fit" and state and "trained" in state:
            model = find_language_model(pl_module, self.language_model)
            SparseDelta(SafetyMask.from_state_dict(state["mask"])).apply(model, state["trained"])
            self._trained = dict(state["trained"])
        if trainer.state.fn != "fit" or state is not None:
            return
        states = [
            state for optimizer in checkpoint.get("optimizer_states", ()) for state in optimizer["state"].values()
        ]
        if any(isinstance(value, Tensor) and value.dim() > 1 for state in states for value in state.values()):
            raise ValueError(
                f"`ckpt_path` expected to be a checkpoint of a fit with {type(self).__name__} but its optimizer trained"
                " whole tensors. Start a new fit from its weights: load them with `load_from_checkpoint`, and leave"
                " `ckpt_path` out."
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the values from the model once more: a learning rate finder trains and puts the model back."""
        super().on_train_start(trainer, pl_module)
        if self._training is None:
            return
        if isinstance(self._training, SparseDelta):
            self._training.rewind()
        else:
            self._training.refresh()
        if self.average_last is not None:
            self._average = AveragedWeights(self._training)
            restored = self._restored if self._resumes else None
            if restored is not None and "average" in restored:
                self._average.load_state_dict(restored["average"])

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """Settle for the mean of fewer steps where the fit ended earlier than planned."""
        if self._average is None or trainer.global_step >= self._last_step:
            return
        self._average.settle()
        rank_zero_warn(
            f"{type(self).__name__}: the fit ended after {trainer.global_step} of {self._last_step} steps, so"
            f" {self._average.steps} are averaged instead of the last {self.average_last}."
        )

    def refresh(self) -> None:
        """Take the weights from the model after something else has replaced them; a mean begins anew."""
        if self._training is None:
            return
        self._training.refresh()
        if self._average is not None:
            self._average = AveragedWeights(self._training)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """Make the patch, and write it if a file was given."""
        if self._training is None or self._model is None or self._mask is None:
            return
        metadata = {"made_by": type(self).__name__, "steps": str(trainer.global_step)}
        if isinstance(self._training, SparseDelta):
            self._patch = self._training.patch(metadata)
            self._warn_of_idle(self._training.idle)
        else:
            self._patch = SafetyPatch.capture(self._model, self._mask, self._before, metadata)
        if self.patch_file is not None and leaves_files(trainer) and trainer.is_global_zero:
            self._patch.save(self.patch_file)
            rank_zero_info(
                f"{type(self).__name__}: {self._patch.changed:,} weights changed; the patch is in"
                f" {os.fspath(self.patch_file)}."
            )

    def _warn_of_idle(self, names: list[str]) -> None:
        if names:
            rank_zero_warn(
                f"{type(self).__name__}: {len(names)} layers were not called during the fit, so that their selected"
                f" weights stand still: {', '.join(names[:_NAMES_SHOWN])}{', …' if len(names) > _NAMES_SHOWN else ''}."
                " They are experts that no token reached, or the model uses their weights without calling the layer."
            )
