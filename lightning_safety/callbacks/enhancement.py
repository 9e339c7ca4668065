# SPDX-License-Identifier: Apache-2.0
"""Safety Enhancement Tuning: train safety-critical weights and nothing else."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_safety.arguments import check_positive
from lightning_safety.callbacks.choice import Method, Minus, WeightChoice
from lightning_safety.callbacks.last_steps import AverageOfLastSteps, check_average_last
from lightning_safety.callbacks.log import leaves_files
from lightning_safety.callbacks.optimizer_states import LoadedElsewhere, SavedElsewhere, check_base, check_saved_states
from lightning_safety.callbacks.resume import restores_late
from lightning_safety.callbacks.selected import SelectedWeightsCallback
from lightning_safety.callbacks.strategies import REPLICATED, SHARDED
from lightning_safety.enforcement import CompactTraining, SafetyPatch, SparseDelta, snapshot_entries
from lightning_safety.enforcement.replicas import WithoutExchange
from lightning_safety.enforcement.sparse_delta import needs_sparse_delta
from lightning_safety.language import find_language_model
from lightning_safety.scoring import LeanScoring, MixtureLayout, SafetyMask, SafetyObjective
from lightning_safety.scoring.shards import is_sharded

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
    under DDP, where every backward pass must reach selected weights in every process, and ``ModelParallelStrategy``
    (FSDP2) with data parallelism alone. The processes share out the prompts to score, and exchange gradients of
    selected weights only under DDP. A checkpoint of FSDP2 has the optimizer's state in the callback's own.

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
            refusing and answering changes from step to step, less so in the mean. None: no mean. Not under FSDP2.
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
        mixture: MixtureLayout | None = None,
        minus: Minus | SafetyObjective | None = None,
        save_mask: os.PathLike[str] | str | None = None,
        show_progress: bool = True,
        average_last: int | None = None,
        patch: os.PathLike[str] | str | None = None,
    ) -> None:
        options: Any = {"mixture": mixture, "minus": minus, "lean": lean}
        choice = WeightChoice(fraction, objective, method, batch_size, seed, include, exclude, show_progress, **options)
        self._saved: SavedElsewhere | None = None
        self._loaded: LoadedElsewhere | None = None
        super().__init__(choice, mask, tokenizer, language_model, save_mask)
        self.average_last = None if average_last is None else check_positive(average_last, "average_last")
        self.patch_file = patch
        self._training: CompactTraining | SparseDelta | None = None
        self._exchange: WithoutExchange | None = None

    def _begin(self) -> None:
        super()._begin()
        self._before: dict[str, Tensor] = {}
        # What a base that does not train, or an adapter's checkpoint, may not hold.
        self._trained: dict[str, Tensor] | None = None
        self._patch: SafetyPatch | None = None
        self._average: AverageOfLastSteps | None = None
        # Of a sharded model: the optimizers of the last fit may be saved after its end.
        self._optimizer_states: list[dict[str, Any]] | None = None
        for handle in (self._saved, self._loaded):
            if handle is not None:
                handle.remove()
        self._saved = self._loaded = None

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
        check_average_last(self.average_last, trainer, model)
        restored = self._resumed
        sparse = needs_sparse_delta(model, mask)
        several, sharded = trainer.world_size > 1, is_sharded(model.parameters())
        check_base(trainer, restored, sparse=sparse, sharded=sharded)
        if sparse:
            self._training = SparseDelta(mask).attach(
                model, trainer.optimizers, trained=restored.get("trained"), before=restored.get("before")
            )
            self._before = self._training.before
        else:
            self._before = snapshot_entries(model, mask) if not restored else restored["before"]
            self._training = training = CompactTraining(mask, replicated=several and not sharded)
            training.attach(model, trainer.optimizers)
            states = restored.pop("optimizers", None)
            if states is not None:
                for optimizer, state in zip(trainer.optimizers, states, strict=True):
                    training.load_optimizer_state(optimizer, state)
            if sharded:
                self._saved = SavedElsewhere(trainer.strategy, trainer.optimizers)
        # Also around a single process.
        if isinstance(trainer.strategy.model, DistributedDataParallel):
            self._exchange = WithoutExchange(trainer.strategy.model)
        if self.average_last is not None:
            self._average = AverageOfLastSteps(trainer, self._training, self.average_last)
        return self._training.bytes

    def release(self) -> None:
        """Stop training; the model is the trained one."""
        for handle in (self._average, self._exchange):
            if handle is not None:
                handle.remove()
        self._exchange = None
        if isinstance(self._training, SparseDelta):
            self._trained = _on_cpu(self._training.entries())
            self._training.settle()
        elif self._training is not None:
            self._training.release()
        self._training = None

    def state_dict(self) -> dict[str, Any]:
        """Return the mask, what is needed to go on and to make the patch, and the state of all random generators."""
        state = super().state_dict()
        if not state:
            return state
        average = None if self._average is None else self._average.state_dict()
        trained = _on_cpu(self._training.entries()) if isinstance(self._training, SparseDelta) else self._trained
        beside = {"before": dict(self._before), "average": average, "trained": trained}
        return state | {name: value for name, value in beside.items() if value is not None}

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the optimizers' states of a sharded model."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        state = checkpoint["callbacks"].get(self.state_key)
        if state and self._saved is not None:
            found = self._states_of_all(trainer)
            # After an error there are none, and whoever resumes the checkpoint hears so.
            state |= {} if found is None else {"optimizers": found}

    def _states_of_all(self, trainer: pl.Trainer) -> list[dict[str, Any]] | None:
        if self._saved is None or not isinstance(self._training, CompactTraining) or trainer.interrupted:
            return self._optimizer_states
        return [self._training.optimizer_state(optimizer) for optimizer in trainer.optimizers]

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
        if trainer.state.fn == "fit":
            check_saved_states(checkpoint, state, self._similar_states, self.state_key, sharded=restores_late(trainer))

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Choose the weights and begin to train them; where a checkpoint is loaded after this, after that."""
        if restores_late(trainer):
            self._loaded = LoadedElsewhere(trainer.strategy)
        super().on_fit_start(trainer, pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the values from the model once more: a learning rate finder trains and puts the model back."""
        if self._loaded is not None:
            self._loaded.remove()
        super().on_train_start(trainer, pl_module)
        if self._training is None:
            return
        if isinstance(self._training, SparseDelta):
            self._training.rewind()
        else:
            self._training.refresh()
        if self._average is not None:
            self._average.begin(self._resumed.get("average"))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """Settle for the mean of fewer steps where the fit ended earlier than planned."""
        if self._average is not None:
            self._average.end(type(self).__name__)

    def refresh(self) -> None:
        """Take the weights from the model after something else has replaced them; a mean begins anew."""
        if self._training is None:
            return
        self._training.refresh()
        if self._average is not None:
            self._average.begin()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        """Make the patch, and write it if a file was given."""
        if self._training is None or self._model is None or self._mask is None:
            return
        self._optimizer_states = self._states_of_all(trainer)
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


def _on_cpu(entries: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: values.cpu() for name, values in entries.items()}
