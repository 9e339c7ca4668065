# SPDX-License-Identifier: Apache-2.0
"""A training step of SmolLM2-135M-Instruct, whole and in parts, and the reference that keeps dense masks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_safety.language import BUNDLED_MODEL, load_causal_lm, load_tokenizer
from lightning_safety.scoring import RefusalMargin, SafetyMask, expected_safety_impact, select_random, select_top

FRACTION = 0.01
BATCH, LENGTH = 4, 128
LEARNING_RATE = 1e-6
CLIP_NORM = 1.0
SEED = 0
SMOLLM2_135M = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}
TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


class TrainingStep:
    """What is timed: forward, backward, clipping and the optimizer's step; or the optimizer's part alone.

    Args:
        model: In training mode.
        optimizer: Of all its parameters, or of those that `CompactTraining` put there.
        in_backward: What hooks do to gradients during a backward pass: the optimizer's part alone calls it.
        before_step: What is done to gradients between backward and clipping.
    """

    def __init__(
        self,
        model: Any,
        optimizer: Optimizer,
        *,
        in_backward: Callable[[], object] | None = None,
        before_step: Callable[[], object] | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.in_backward = in_backward
        self.before_step = before_step

    def whole(self, batch: int = BATCH, length: int = LENGTH) -> None:
        """Make a step."""
        self.optimizer.zero_grad()
        forward_and_backward(self.model, batch, length)
        if self.before_step is not None:
            self.before_step()
        trained = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        torch.nn.utils.clip_grad_norm_(trained, CLIP_NORM)
        self.optimizer.step()

    def optimizer_part(self) -> None:
        """Do all of it that is neither the model's forward and backward pass nor clipping, on the last gradients."""
        for part in (self.in_backward, self.before_step, self.optimizer.step):
            if part is not None:
                part()


class DenseMasks:
    """The reference: a boolean mask for every tensor, and a full copy of its values.

    Gradients are multiplied by the masks before a step; after it, what was not free is copied back. Published code has
    masks in the weights' dtype: these take four times the memory here, and multiply about three times as fast.

    Args:
        model: What is trained.
        mask: Which weights.
        free: Whether the mask selects what may move, or what may not.
    """

    def __init__(self, model: torch.nn.Module, mask: SafetyMask, *, free: bool) -> None:
        self._parts: list[tuple[torch.nn.Parameter, Tensor, Tensor]] = []
        for name, parameter in model.named_parameters():
            if not free and name not in mask.indices:
                continue  # All of it may move.
            may_move = torch.full((parameter.numel(),), not free)
            if name in mask.indices:
                may_move[mask.indices[name].long()] = free
            self._parts.append((parameter, may_move.view(parameter.shape), parameter.detach().clone()))

    @property
    def bytes(self) -> int:
        """Memory of the masks and the copy, in bytes."""
        return sum(may_move.nbytes + saved.nbytes for _, may_move, saved in self._parts)

    def mask_gradients(self) -> None:
        """Multiply."""
        for parameter, may_move, _ in self._parts:
            if parameter.grad is not None:
                parameter.grad.mul_(may_move)

    def restore(self, *_: object) -> None:
        """Copy back. An optimizer calls it after its steps."""
        with torch.no_grad():
            for parameter, may_move, saved in self._parts:
                torch.where(may_move, parameter, saved, out=parameter)


def forward_and_backward(model: Any, batch: int = BATCH, length: int = LENGTH) -> None:
    """Compute the gradients of a language-modelling loss on random tokens, the same ones each time."""
    generator = torch.Generator().manual_seed(SEED)
    tokens = torch.randint(100, model.config.vocab_size, (batch, length), generator=generator)
    model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()


def make_optimizer(model: torch.nn.Module, *, fused: bool) -> Optimizer:
    """Return AdamW over all parameters."""
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=fused)


def load_model(*, quick: bool) -> Any:
    """Return SmolLM2-135M-Instruct in float32 and training mode; a tiny one with its vocabulary if `quick`."""
    return random_model(quick=True) if quick else load_causal_lm(BUNDLED_MODEL, dtype="float32").train()


def random_model(*, quick: bool) -> Any:
    """Return a model of SmolLM2-135M's shapes, or a tiny one with its vocabulary: random weights, nothing read."""
    torch.manual_seed(SEED)
    shapes = TINY if quick else SMOLLM2_135M
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=49152, tie_word_embeddings=True, **shapes, **ends)).train()


def make_masks(model: Any, *, quick: bool) -> tuple[SafetyMask, SafetyMask]:
    """Score the model as a fit does. Return the top fraction and a random one of the same size."""
    objective = RefusalMargin(limit=2 if quick else None)
    scores = expected_safety_impact(model, objective, load_tokenizer(BUNDLED_MODEL))
    return select_top(scores, FRACTION), select_random(scores, FRACTION, SEED)


def count_parameters(model: torch.nn.Module) -> int:
    """Return how many weights a model has, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())
