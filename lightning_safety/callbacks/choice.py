# SPDX-License-Identifier: Apache-2.0
"""Choosing weights for a callback: by score, at random, or from a mask that is given."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_safety.arguments import check_choice, check_fraction, check_positive
from lightning_safety.language.quantized import weight_shape
from lightning_safety.randomness import preserved_random_state
from lightning_safety.scoring import (
    LeanScoring,
    MixtureLayout,
    ObjectiveBatch,
    RefusalLikelihood,
    RefusalMargin,
    SafetyMask,
    SafetyObjective,
    estimate_scoring_memory,
    expected_safety_impact,
    scored_weights,
    select_bottom,
    select_neurons,
    select_random,
    select_top,
)
from lightning_safety.scoring.mixture import check_layout
from lightning_safety.scoring.neurons import Granularity
from lightning_safety.scoring.shards import is_sharded

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedTokenizerBase

Method = Literal["top", "bottom", "random"]
Minus = Literal["utility"]
_MOST_WITH_MINUS = 0.5


@dataclass
class WeightChoice:
    """How weights are chosen where no mask is given; the arguments are those of `SafetyPreservingAdaptation`."""

    fraction: float
    objective: SafetyObjective | None
    method: Method
    batch_size: int
    seed: int
    include: str | Sequence[str] | None
    exclude: str | Sequence[str] | None
    show_progress: bool
    granularity: Granularity = "weight"
    mixture: MixtureLayout | None = None
    minus: Minus | SafetyObjective | None = None
    lean: LeanScoring = field(default_factory=LeanScoring)

    def __post_init__(self) -> None:
        self.fraction = check_fraction(self.fraction)
        check_positive(self.batch_size, "batch_size")
        check_choice(self.method, "method", get_args(Method))
        check_choice(self.granularity, "granularity", get_args(Granularity))
        check_layout(self.mixture)
        if not isinstance(self.lean, LeanScoring):
            raise TypeError(
                f"`lean` expected to be a LeanScoring but got {type(self.lean).__name__}. Pass for instance"
                " `LeanScoring(passes=4)`."
            )
        self._check_minus()
        if self.objective is not None and not isinstance(self.objective, SafetyObjective):
            raise TypeError(
                f"`objective` expected to be a SafetyObjective but got {type(self.objective).__name__}."
                " Pass an instance, for instance `RefusalMargin()`."
            )

    def mask(
        self,
        model: nn.Module,
        find_tokenizer: Callable[[], PreTrainedTokenizerBase],
        *,
        quick: bool,
        number: int = 0,
    ) -> SafetyMask:
        """Choose weights of `model`.

        Args:
            model: The causal language model, on its device.
            find_tokenizer: Called where scores need a tokenizer.
            quick: Whether two prompts are enough, for a run that only tries everything once.
            number: Which choice of a fit this is, from 0: a random one is drawn anew each time.
        """
        metadata = {"model": str(getattr(model, "name_or_path", "") or type(model).__name__)}
        if self.mixture is not None:
            metadata |= self.mixture.describe()
        if self.method == "random":
            weights = scored_weights(model, include=self.include, exclude=self.exclude, mixture=self.mixture)
            shapes: dict[str, Tensor] = {
                name: torch.empty(weight_shape(w), device="meta") for name, w in weights.items()
            }
            return self._select(model, shapes, metadata, seed=self.seed + number)
        objective = RefusalMargin() if self.objective is None else self.objective
        tokenizer = find_tokenizer()
        subtracted = None
        if self.minus is not None and self.method == "top":
            other = RefusalLikelihood("harmless") if isinstance(self.minus, str) else self.minus
            # First, and only its mask is kept: two sets of scores would take twice the memory.
            subtracted = select_top(self._scores(model, other, tokenizer, quick), self.fraction)
            metadata |= {f"minus_{key}": value for key, value in other.describe().items()}
        scores = self._scores(model, objective, tokenizer, quick)
        return self._select(model, scores, metadata | objective.describe(), subtracted=subtracted)

    def _scores(
        self, model: nn.Module, objective: SafetyObjective, tokenizer: PreTrainedTokenizerBase, quick: bool
    ) -> Mapping[str, Tensor]:
        options: dict[str, Any] = {
            "batch_size": self.batch_size,
            "include": self.include,
            "exclude": self.exclude,
            "mixture": self.mixture,
            **asdict(self.lean),
        }
        if not quick:
            _tell_memory(model, objective, tokenizer, options)
        return expected_safety_impact(
            model,
            TwoPrompts(objective) if quick else objective,
            tokenizer,
            # All of them are here, one or several.
            shared=True,
            show_progress=self.show_progress,
            **options,
        )

    def _select(
        self,
        model: nn.Module,
        scores: Mapping[str, Tensor],
        metadata: dict[str, str],
        *,
        seed: int = 0,
        subtracted: SafetyMask | None = None,
    ) -> SafetyMask:
        if self.granularity == "neuron":
            if any(isinstance(module, Conv1D) for module in model.modules()):
                raise ValueError(
                    "`granularity='neuron'` expected a model whose weights are stored [out, in] but"
                    f" {type(model).__name__} stores some the other way around (Conv1D). Use `granularity='weight'`."
                )
            return select_neurons(scores, self.fraction, method=self.method, seed=seed, metadata=metadata)
        if self.method == "random":
            return select_random(scores, self.fraction, seed, metadata=metadata)
        if self.method == "bottom":
            return select_bottom(scores, self.fraction, metadata=metadata)
        return select_top(scores, self.fraction, exclude=subtracted, metadata=metadata)

    def _check_minus(self) -> None:
        if self.minus is None:
            return
        if isinstance(self.minus, str):
            check_choice(self.minus, "minus", get_args(Minus))
        elif not isinstance(self.minus, SafetyObjective):
            raise TypeError(
                f"`minus` expected to be 'utility' or a SafetyObjective but got {type(self.minus).__name__}."
                " Pass `minus='utility'`, or an instance, for instance `RefusalLikelihood('harmless')`."
            )
        if self.fraction > _MOST_WITH_MINUS:
            raise ValueError(
                f"`fraction` expected to be at most {_MOST_WITH_MINUS} beside `minus`, which takes as many weights out,"
                f" but got {self.fraction}. Lower it, or leave `minus` out."
            )
        if self.granularity != "weight":
            raise ValueError(
                "`minus` expected `granularity='weight'` beside it but got 'neuron': rows are not subtracted from rows."
                " Leave one of the two out."
            )


def _tell_memory(
    model: nn.Module, objective: SafetyObjective, tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]
) -> None:
    """Say what scoring takes before it starts, and stop where that is not free.

    Not of a model that is sharded, nor for an objective that has yet to ask the model.

    Raises:
        MemoryError: It is not.
    """
    if objective.prepares or is_sharded(model.parameters()):
        return
    try:
        with preserved_random_state():
            memory = estimate_scoring_memory(model, objective, tokenizer, **options)
    except Exception as error:
        # An objective or a model of the user's own need not say what it runs; scoring raises what else is wrong.
        rank_zero_info(f"What scoring takes is not estimated: {error}")
        return
    rank_zero_info(memory.summary())
    memory.check_free()


class GivenMask:
    """The mask that a callback was given, in memory or as a file that is read when it is needed."""

    def __init__(self, mask: SafetyMask | str | os.PathLike[str] | None) -> None:
        if not isinstance(mask, SafetyMask | str | os.PathLike | None):
            raise TypeError(
                f"`mask` expected to be a SafetyMask or the path of one but got {type(mask).__name__}."
                " Leave it out to score the model at the start of the fit."
            )
        self._mask = mask if isinstance(mask, SafetyMask) else None
        self.path = None if mask is None or isinstance(mask, SafetyMask) else Path(mask)

    @cached_property
    def name(self) -> str | None:
        """The file's name, or a short digest of what a mask in memory selects; None where none was given.

        Computed once: Lightning asks for a callback's name at every hook of every batch.
        """
        if self.path is not None:
            return self.path.name
        if self._mask is None:
            return None
        return self._mask.digest[:12]

    def read(self) -> SafetyMask | None:
        """Return the mask, or None where none was given.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is not a mask.
        """
        if self._mask is None and self.path is not None:
            self._mask = SafetyMask.load(self.path)
        return self._mask


class TwoPrompts(SafetyObjective):
    """An objective on its first two prompts, for a run that only tries everything once."""

    def __init__(self, objective: SafetyObjective) -> None:
        self._objective = objective

    @property
    def prepares(self) -> bool:
        """Whether the objective does."""
        return self._objective.prepares

    def prepare(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
        """Prepare the objective."""
        self._objective.prepare(model, tokenizer)

    def prepare_together(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
        """Prepare the objective in all processes."""
        self._objective.prepare_together(model, tokenizer)

    def batches(self, tokenizer: PreTrainedTokenizerBase, *, batch_size: int) -> list[ObjectiveBatch]:  # noqa: ARG002
        """Return its first two examples, one a batch."""
        return self._objective.batches(tokenizer, batch_size=1)[:2]

    def loss(self, model: nn.Module, batch: ObjectiveBatch) -> Tensor:
        """Return its loss."""
        return self._objective.loss(model, batch)
