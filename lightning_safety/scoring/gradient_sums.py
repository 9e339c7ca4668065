# SPDX-License-Identifier: Apache-2.0
"""The mean gradient of an objective over its examples: in blocks of weights, and by several processes together."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lightning_safety.arguments import check_positive
from lightning_safety.language.modes import differentiated_beside_training
from lightning_safety.language.quantized import exact_inputs, keep_unpacked
from lightning_safety.processes import check_alike, gather, share_of, sum_over_processes, together, unannounced
from lightning_safety.progress import track
from lightning_safety.randomness import preserved_random_state
from lightning_safety.scoring.finite import check_gradients, check_loss, has_finite_norm
from lightning_safety.scoring.layer_gradients import WeightGradients
from lightning_safety.scoring.lean import LeanScoring, weight_blocks
from lightning_safety.scoring.objective import ObjectiveBatch, SafetyObjective
from lightning_safety.scoring.sharded_gradients import mean_of_shards
from lightning_safety.scoring.shards import check_shards, is_sharded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Gradients = dict[str, Tensor]


@dataclass(frozen=True)
class GradientSums:
    """How the gradients of an objective's examples are added up; the arguments are `expected_safety_impact`'s.

    Attributes:
        absolute: Whether absolute gradients are averaged, one example at a time.
    """

    model: nn.Module
    objective: SafetyObjective
    batch_size: int = 8
    absolute: bool = False
    lean: LeanScoring = field(default_factory=LeanScoring)
    shared: bool = False
    show_progress: bool = True

    def __post_init__(self) -> None:
        check_positive(self.batch_size, "batch_size")

    def mean(
        self,
        tokenizer: PreTrainedTokenizerBase,
        weights: Mapping[str, nn.Parameter],
        finish: Callable[[Gradients], object] = lambda _: None,
    ) -> Gradients:
        """Return the mean gradients of all weights, by name, where and in what dtype `lean` says.

        Args:
            tokenizer: The model's.
            weights: By canonical name.
            finish: Called with the gradients of each block of weights, to change them in place.
        """
        self._check_shards(weights)
        keep_unpacked(self.model)
        with preserved_random_state(), _scoring_state(self.model, weights):
            batches = self._batches(tokenizer)
            blocks = weight_blocks(weights, self.lean.passes)
            found: Gradients = {}
            moved = False
            for block in blocks:
                # Every pass draws what the only one would draw.
                with preserved_random_state():
                    gradients = self._mean_of_block(batches, block, partly=len(blocks) > 1)
                moved = moved or any(bool(gradient.any()) for gradient in gradients.values())
                finish(gradients)
                for name in block:
                    # Left where they are, or held by a name, they would stand beside the sums of the next block.
                    found[name] = gradients.pop(name) if len(blocks) == 1 else gradients.pop(name).cpu()
        if is_sharded(weights.values()):
            moved = any(gather(moved))
        if not moved:
            raise RuntimeError(
                "The gradient of `objective` is zero for every weight: there is nothing to rank them by."
            )
        return found

    def _batches(self, tokenizer: PreTrainedTokenizerBase) -> list[ObjectiveBatch]:
        prepare = self.objective.prepare_together if self.shared else self.objective.prepare
        with together("Preparing the objective") if self.shared else nullcontext():
            prepare(self.model, tokenizer)
            batches = self.objective.batches(tokenizer, batch_size=1 if self.absolute else self.batch_size)
            if not batches:
                raise ValueError("`objective` expected to have examples but has no batch. Give it at least one.")
            if self.shared:
                check_alike(_digest(batches), "objective", "Give every process the same prompts, in the same order.")
        return batches

    def _mean_of_block(
        self, batches: Sequence[ObjectiveBatch], weights: Mapping[str, nn.Parameter], *, partly: bool
    ) -> Gradients:
        """Return the means of some weights; where these are not all, the loss may depend on none of them: `partly`."""
        if is_sharded(weights.values()):
            objective = self.lean.wrap(self.objective)
            with unannounced():
                return mean_of_shards(
                    self.model, objective, batches, weights, self.lean, show_progress=self.show_progress
                )
        # That of the embedding, where the model is spread over devices.
        device = next(self.model.parameters()).device
        objective = self.lean.wrap(self.objective)
        sums = {name: self.lean.zeros(weight) for name, weight in weights.items()}
        finite: dict[str, Tensor] = {}
        examples = 0  # of the present batch

        def add(name: str, gradient: Tensor) -> None:
            gradient = (gradient.abs() if self.absolute else gradient).to(sums[name].device)
            # What is not finite stays so in the sum, which is there to be looked at again.
            finite[name] = has_finite_norm(sums[name].add_(gradient, alpha=examples))

        numbered = list(enumerate(batches, start=1))
        share = share_of(numbered) if self.shared else numbered
        block: AbstractContextManager[None] = together("Scoring weights") if self.shared else nullcontext()
        gradients = WeightGradients(self.model, weights, add, partly=partly)
        with block, exact_inputs(self.model), gradients:
            for number, batch in track(share, "Scoring weights", enabled=self.show_progress):
                place = f"batch {number} of {len(batches)}"
                self._check_single(batch, place)
                examples = batch.examples
                loss = objective.loss(self.model, batch.to(device))
                check_loss(loss, place)
                finite.clear()
                gradients.backward(loss)
                check_gradients(finite, sums, loss, place)
                # What a backward pass did not reach would stay in memory beside the next batch.
                del loss
        if self.shared:
            sum_over_processes(sums.values(), device=device)
        total_examples = sum(batch.examples for batch in batches)
        return {name: total.div_(total_examples) for name, total in sums.items()}

    def _check_shards(self, weights: Mapping[str, nn.Parameter]) -> None:
        """Refuse what has not been shown to work on a sharded model."""
        if not is_sharded(weights.values()):
            return
        check_shards(weights)
        prepares = type(self.objective).__name__ if self.objective.prepares else None
        reason = "`reduction='absolute'`" if self.absolute else prepares
        if reason is not None or not self.shared:
            raise ValueError(
                f"`model` expected not to be sharded beside {reason or '`shared=False`'}. Score it on one device, for"
                " instance with `lightning-safety score`, and pass the saved mask."
            )

    def _check_single(self, batch: ObjectiveBatch, place: str) -> None:
        if self.absolute and batch.examples != 1:
            raise ValueError(
                f"`objective` expected to give one example a batch for `batch_size=1` but {place} holds"
                f' {batch.examples}: `reduction="absolute"` needs the gradient of each example.'
            )


def _digest(batches: Sequence[ObjectiveBatch]) -> str:
    """Return a digest of all that batches hold."""
    digest = hashlib.sha256()
    for batch in batches:
        for name, tensor in batch.tensors.items():
            digest.update(f"{batch.examples} {name} {tensor.dtype} {list(tensor.shape)} {tensor.tolist()}".encode())
    return digest.hexdigest()


@contextmanager
def _scoring_state(model: nn.Module, weights: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Evaluation mode, full precision, gradients and uncompiled code, whatever surrounds the call; then as before."""
    devices = {weight.device.type for weight in weights.values()}
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        for device in devices:
            stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(differentiated_beside_training(model))
        yield
