# SPDX-License-Identifier: Apache-2.0
"""Scoring models that leave little room beside them: in several passes, with sums elsewhere or in half precision."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_safety.arguments import check_choice, check_positive
from lightning_safety.language.quantized import weight_shape
from lightning_safety.scoring.objective import ObjectiveBatch, SafetyObjective
from lightning_safety.scoring.shards import local_part

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AccumulateOn = Literal["device", "cpu"]
AccumulateDtype = Literal["float32", "bfloat16"]
Autocast = Literal["bfloat16"]


@dataclass(frozen=True)
class LeanScoring:
    """What scoring gives up to take less memory or time; the defaults give up nothing.

    The sums of gradients take 4 bytes for every scored weight, twice a model in bfloat16. What each choice costs,
    measured, is in ``docs/scaling.md``.

    Args:
        passes: Score the weights in at most so many blocks of consecutive tensors, as even as these allow, one pass
            over all examples for each. Sums and gradients exist for one block at a time; with more than one block,
            finished scores go to the CPU. The scores are the same, bit for bit where torch is deterministic. n passes
            take about (n + 1) / 2 times as long: all run the whole model forward, and backward as far as their block.
            It saves memory of a GPU; on a CPU, scores stay beside the sums.
        accumulate_on: Where sums and scores are. ``"device"``: with the weight. ``"cpu"``: in main memory; every
            gradient is copied there, so that one pass is enough but every batch copies as many numbers as are scored.
        accumulate_dtype: Of sums and scores, ``"float32"`` or ``"bfloat16"``. Bfloat16 takes half the memory and keeps
            8 bits of every sum, so that what lies near the boundary of a selection changes sides: on
            SmolLM2-135M-Instruct the top 1 % agrees with that of float32 by a Jaccard index of 0.99.
        autocast: ``"bfloat16"``: compute the loss and its gradients under bfloat16 autocast, beside weights in float32
            for instance; the top 1 % there agrees by 0.97. None: in the dtype of the weights. Float16 is no choice: its
            gradients vanish.

    Raises:
        TypeError: `passes` is not an integer.
        ValueError: An argument is not one of its choices.

    Example:
        >>> LeanScoring(passes=4).passes
        4
    """

    passes: int = 1
    accumulate_on: AccumulateOn = "device"
    accumulate_dtype: AccumulateDtype = "float32"
    autocast: Autocast | None = None

    def __post_init__(self) -> None:
        check_positive(self.passes, "passes")
        check_choice(self.accumulate_on, "accumulate_on", get_args(AccumulateOn))
        check_choice(self.accumulate_dtype, "accumulate_dtype", get_args(AccumulateDtype))
        if self.autocast is not None:
            check_choice(self.autocast, "autocast", get_args(Autocast))

    @property
    def dtype(self) -> torch.dtype:
        """Of sums and scores."""
        return torch.bfloat16 if self.accumulate_dtype == "bfloat16" else torch.float32

    def zeros(self, weight: nn.Parameter) -> Tensor:
        """Return an empty sum of the gradients of a weight, of its shape in the layer, or of this process's part."""
        local = local_part(weight)
        device = torch.device("cpu") if self.accumulate_on == "cpu" else local.device
        return torch.zeros(weight_shape(local), dtype=self.dtype, device=device)

    def wrap(self, objective: SafetyObjective) -> SafetyObjective:
        """Return the objective with its loss under autocast where that is chosen."""
        return objective if self.autocast is None else _UnderAutocast(objective)


def weight_blocks(weights: Mapping[str, nn.Parameter], passes: int) -> list[dict[str, nn.Parameter]]:
    """Split weights into at most `passes` blocks of consecutive tensors, the largest as small as can be.

    Args:
        weights: By name, at least one. They are counted by their shapes in the layers.
        passes: At least 1. There are fewer blocks where more would leave the largest as it is.

    Example:
        >>> sizes = {"a": 3, "b": 1, "c": 2, "d": 2}
        >>> blocks = weight_blocks({name: nn.Parameter(torch.ones(size)) for name, size in sizes.items()}, 2)
        >>> [list(block) for block in blocks]
        [['a', 'b'], ['c', 'd']]
    """
    sizes = {name: math.prod(weight_shape(weight)) for name, weight in weights.items()}

    def fill(capacity: int) -> list[dict[str, nn.Parameter]]:
        blocks: list[dict[str, nn.Parameter]] = []
        room = 0
        for name, weight in weights.items():
            if not blocks or sizes[name] > room:
                blocks.append({})
                room = capacity
            blocks[-1][name] = weight
            room -= sizes[name]
        return blocks

    low, high = max(sizes.values()), sum(sizes.values())
    while low < high:
        middle = (low + high) // 2
        if len(fill(middle)) <= passes:
            high = middle
        else:
            low = middle + 1
    return fill(low)


class _UnderAutocast(SafetyObjective):
    """An objective whose loss is computed under bfloat16 autocast."""

    def __init__(self, objective: SafetyObjective) -> None:
        self._objective = objective

    def prepare(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
        """Prepare the objective, in the dtype of the weights."""
        self._objective.prepare(model, tokenizer)

    def batches(self, tokenizer: PreTrainedTokenizerBase, *, batch_size: int) -> list[ObjectiveBatch]:
        """Return its examples."""
        return self._objective.batches(tokenizer, batch_size=batch_size)

    def loss(self, model: nn.Module, batch: ObjectiveBatch) -> Tensor:
        """Return its loss."""
        device = next(iter(batch.tensors.values())).device.type
        try:
            with torch.autocast(device, dtype=torch.bfloat16):
                return self._objective.loss(model, batch)
        finally:
            # An autocast around this one, on or off, would keep the cast copies of all weights to its own end.
            torch.clear_autocast_cache()
