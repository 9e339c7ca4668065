# SPDX-License-Identifier: Apache-2.0
"""How much memory scoring a model will take, said before it starts."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from lightning_safety.arguments import check_choice, check_positive
from lightning_safety.data.collator import IGNORED_LABEL
from lightning_safety.devices import free_memory, in_gigabytes
from lightning_safety.language.modes import evaluation_mode
from lightning_safety.language.quantized import is_quantized_weight, weight_shape
from lightning_safety.scoring.lean import AccumulateDtype, AccumulateOn, Autocast, LeanScoring, weight_blocks
from lightning_safety.scoring.mixture import MixtureLayout
from lightning_safety.scoring.objective import SafetyObjective
from lightning_safety.scoring.weights import scored_weights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Numbers that a layer keeps of a token until the backward pass, counted by `torch.autograd.graph.saved_tensors_hooks`
# under scaled dot-product attention: of Llama 11 to 12 times the hidden size in float32 and 13 to 14 in bfloat16 (its
# norms compute in float32), of Qwen 3 16 and 18, for its norms of queries and keys; 4 times the MLP's own size of both.
_HIDDEN = 14
_INTERMEDIATE = 4
# Logits, their log-softmax and the gradient of it, in float32.
_LOGITS = 3
_FLOAT32_BYTES = 4


@dataclass(frozen=True)
class ScoringMemory:
    """What scoring takes beside the loaded model, in bytes.

    Attributes:
        device: Where the model is.
        sums: Sums of gradients of the largest block of weights, on `device` or, by choice, in main memory.
        scores: All finished scores. They are the sums themselves where there is one block, and in main memory where
            there are several.
        gradients: Gradients that exist at a time, on `device`: that of one weight, or of the largest block where rows
            share what they begin with (each weight is used twice then, and the first part waits for the second).
        activations: What the largest batch keeps until the backward pass, roughly; under autocast with copies of the
            weights. They make room as gradients come.
        lean: The choices that these numbers are for.
    """

    device: torch.device
    sums: int
    scores: int
    gradients: int
    activations: int
    lean: LeanScoring

    @property
    def on_device(self) -> int:
        """Bytes that have to be free where the model is; on the CPU, all of them."""
        passing = max(self.gradients, self.activations)
        if self.device.type == "cpu":
            # Finished blocks stay where they are.
            return self.scores + passing
        return passing if self.lean.accumulate_on == "cpu" else self.sums + passing

    @property
    def in_main_memory(self) -> int:
        """Bytes that have to be free in main memory."""
        if self.device.type == "cpu":
            return self.on_device
        return self.scores if self.lean.accumulate_on == "cpu" or self.sums < self.scores else 0

    def summary(self) -> str:
        """Return one line that says all of this.

        Example:
            >>> ScoringMemory(torch.device("cpu"), 4 * 10**8, 4 * 10**8, 3 * 10**6, 9 * 10**8, LeanScoring()).summary()
            'Scoring takes about 1.30 GB on cpu: sums of gradients 0.40 GB, activations 0.90 GB.'
        """
        passing = max(self.gradients, self.activations)
        line = (
            f"Scoring takes about {in_gigabytes(self.on_device)} on {self.device}: sums of gradients"
            f" {in_gigabytes(self.on_device - passing)},"
            f" {'activations' if passing == self.activations else 'gradients'} {in_gigabytes(passing)}."
        )
        if self.device.type != "cpu" and self.in_main_memory:
            line += f" Scores take {in_gigabytes(self.in_main_memory)} of main memory."
        return line

    def check_free(self) -> None:
        """Compare with the memory that is free now, where that can be known.

        Warns where it is likely not to suffice: activations are an estimate.

        Raises:
            MemoryError: It does not suffice even without activations. The message names what takes less.
        """
        free = free_memory(self.device)
        certain = self.on_device - max(0, self.activations - self.gradients)
        if free is not None and certain > free:
            raise MemoryError(
                f"`model` expected to leave {in_gigabytes(certain)} free on {self.device} for gradients and their sums"
                f" but {in_gigabytes(free)} is. {self._advice(free)}"
            )
        if free is not None and self.on_device > free:
            warnings.warn(
                f"Scoring is likely to run out of memory: it takes about {in_gigabytes(self.on_device)} on"
                f" {self.device}, {in_gigabytes(self.activations)} of it for activations, and {in_gigabytes(free)} is"
                f" free. Lower `batch_size`. {self._advice(free)}",
                stacklevel=2,
            )
        free = None if self.device.type == "cpu" else free_memory(torch.device("cpu"))
        if free is not None and self.in_main_memory > free:
            raise MemoryError(
                f"`model` expected to find {in_gigabytes(self.in_main_memory)} of main memory free for its scores but"
                f' {in_gigabytes(free)} is. Pass `accumulate_dtype="bfloat16"`, or score fewer weights by `include`.'
            )

    def _advice(self, free: int) -> str:
        """Return what takes less, of what is not chosen already."""
        half = [] if self.lean.accumulate_dtype == "bfloat16" else ['`accumulate_dtype="bfloat16"`']
        if self.device.type == "cpu":
            # Scores stay in the same memory: passes and places change nothing.
            return f"Pass {' or '.join([*half, '`include` to score fewer weights'])}."
        # Of n blocks, each has an n-th of the sums and, at most, of the gradients.
        parts = (0 if self.lean.accumulate_on == "cpu" else self.scores) + self.gradients * self.scores / self.sums
        fewest = max(2, math.ceil(parts / max(1, free - self.activations)))
        passes = [f"`passes={fewest}`"] if free > self.activations else []
        place = [] if self.lean.accumulate_on == "cpu" else ['`accumulate_on="cpu"`']
        return f"Pass {' or '.join([*passes, *place, *half] or ['`include` to score fewer weights'])}."


def estimate_scoring_memory(
    model: nn.Module,
    objective: SafetyObjective | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    tokens: int | None = None,
    batch_size: int = 8,
    reduction: str = "signed",
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    mixture: MixtureLayout | None = None,
    passes: int = 1,
    accumulate_on: AccumulateOn = "device",
    accumulate_dtype: AccumulateDtype = "float32",
    autocast: Autocast | None = None,
) -> ScoringMemory:
    """Estimate what `expected_safety_impact` with the same arguments takes beside the model. Nothing is computed by it.

    Sums and scores are exact. Activations are those of a decoder of attention and gated MLPs under scaled dot-product
    attention, what rows begin with counted once; other attention keeps its own matrices beside. How far the estimate is
    off on a real model is in ``docs/scaling.md``.

    Args:
        model: A causal language model, loaded and on its device.
        objective: The objective whose largest batch counts. It must be able to give its batches: one that has to ask
            the model first (`GuardJudgedSafety`) needs `prepare`, or give `tokens`.
        tokenizer: The model's tokenizer, beside `objective`.
        tokens: In place of the two: how many tokens the largest batch has, all of them counted as predicted, in several
            rows.
        batch_size: As for `expected_safety_impact`, and so are the following.
        reduction: As there.
        include: As there.
        exclude: As there.
        mixture: As there.
        passes: As there.
        accumulate_on: As there.
        accumulate_dtype: As there.
        autocast: As there.

    Raises:
        ValueError: As by `expected_safety_impact`, or neither `tokens` nor `objective` and `tokenizer` are given.

    Example:
        >>> from tests.tiny import make_tiny_model
        >>> memory = estimate_scoring_memory(make_tiny_model(), tokens=100)
        >>> memory.sums == 4 * 18432
        True
    """
    check_choice(reduction, "reduction", ("signed", "absolute"))
    lean = LeanScoring(passes, accumulate_on, accumulate_dtype, autocast)
    weights = scored_weights(model, include=include, exclude=exclude, mixture=mixture)
    blocks = weight_blocks(weights, passes)
    sizes = {name: math.prod(weight_shape(weight)) for name, weight in weights.items()}
    item = lean.dtype.itemsize
    absolute = reduction == "absolute"
    if tokens is not None:
        largest = _Largest(check_positive(tokens, "tokens"), tokens, True)
    elif objective is not None and tokenizer is not None:
        size = 1 if absolute else check_positive(batch_size, "batch_size")
        largest = _largest_batch(model, objective, tokenizer, size)
    else:
        raise ValueError(
            "`objective` and `tokenizer` expected to be given, or `tokens`, for an estimate of activations but none is."
            " Pass for instance `RefusalMargin()` and the model's tokenizer."
        )
    gradients = {name: _gradient_bytes(weight, sizes[name], absolute) for name, weight in weights.items()}
    at_once = max(waits + beside for waits, beside in gradients.values())
    waiting = (
        sum(gradients[name][0] for name in block) + max(gradients[name][1] for name in block) for block in blocks
    )
    return ScoringMemory(
        device=next(iter(weights.values())).device,
        sums=max(sum(sizes[name] for name in block) for block in blocks) * item,
        scores=sum(sizes.values()) * item,
        gradients=max(waiting) if largest.shared else at_once,
        activations=_activation_bytes(model, largest, cast=autocast is not None, weights=sum(sizes.values())),
        lean=lean,
    )


class _Largest(NamedTuple):
    """The most that a batch holds."""

    tokens: int  # that are run, padding included
    predicted: int
    shared: bool  # whether rows begin alike, so that weights are used twice


def _largest_batch(
    model: nn.Module, objective: SafetyObjective, tokenizer: PreTrainedTokenizerBase, batch_size: int
) -> _Largest:
    largest = _Largest(1, 1, False)
    for batch in objective.batches(tokenizer, batch_size=batch_size):
        # What can be shared depends on the mode, and scoring evaluates.
        with evaluation_mode(model):
            run = objective.tokens_run(model, batch)
        labels = batch.tensors.get("labels")
        predicted = run.tokens if labels is None else int((labels != IGNORED_LABEL).sum())
        largest = _Largest(
            max(largest.tokens, run.tokens), max(largest.predicted, predicted), largest.shared or run.shared
        )
    return largest


def _gradient_bytes(weight: nn.Parameter, size: int, absolute: bool) -> tuple[int, int]:
    """Return what the gradient of one weight takes, and what stands beside it while it is formed or added."""
    if is_quantized_weight(weight):
        # It is formed in float32, beside the dequantised weight that the layer below waits for.
        return _FLOAT32_BYTES * size, _FLOAT32_BYTES * size
    own = weight.dtype.itemsize * size
    return own, own if absolute else 0


def _activation_bytes(model: nn.Module, largest: _Largest, *, cast: bool, weights: int) -> int:
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    hidden, layers = (getattr(config, name, None) for name in ("hidden_size", "num_hidden_layers"))
    if not isinstance(hidden, int) or not isinstance(layers, int):
        raise ValueError(
            f"`model` expected to have a config with `hidden_size` and `num_hidden_layers` but that of"
            f" {type(model).__name__} lacks them, so its activations cannot be estimated."
        )
    item = next(model.parameters()).dtype.itemsize
    # Half of what is kept is in bfloat16 then, and so are copies of all weights.
    per_number = (item + 2) / 2 if cast else item
    per_layer = _HIDDEN * hidden + _INTERMEDIATE * _intermediate(config, hidden)
    logits = _LOGITS * _FLOAT32_BYTES * largest.predicted * int(getattr(config, "vocab_size", 0))
    return int(largest.tokens * layers * per_layer * per_number) + logits + (2 * weights if cast and item > 2 else 0)


def _intermediate(config: Any, hidden: int) -> int:
    """Return the size of the MLPs that one token runs through in a layer, that of all its experts together."""
    dense = getattr(config, "intermediate_size", None) or 4 * hidden
    chosen = getattr(config, "num_experts_per_tok", None)
    if not chosen:
        return int(dense)
    shared = getattr(config, "shared_expert_intermediate_size", None) or 0
    return int(chosen * (getattr(config, "moe_intermediate_size", None) or dense) + shared)
