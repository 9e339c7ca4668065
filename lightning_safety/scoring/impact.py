# SPDX-License-Identifier: Apache-2.0
"""Expected Safety Impact: how much each weight of a model matters for a safety objective."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_safety.arguments import check_positive, closest
from lightning_safety.language.modes import evaluation_mode
from lightning_safety.progress import track
from lightning_safety.randomness import preserved_random_state
from lightning_safety.scoring.objective import ObjectiveBatch, SafetyObjective
from lightning_safety.scoring.weights import scored_weights, weight_spread

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Reduction = Literal["signed", "absolute"]
Scale = Literal["std", "magnitude", "none"]


def expected_safety_impact(
    model: nn.Module,
    objective: SafetyObjective,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int = 8,
    reduction: Reduction = "signed",
    scale: Scale = "std",
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    show_progress: bool = True,
) -> dict[str, Tensor]:
    r"""Score every weight by the Expected Safety Impact (ESI).

    .. math:: \mathrm{ESI}_i = \sigma(W) \cdot \left| \mathbb{E}_x\, \partial S(x; \theta) / \partial \theta_i \right|

    with S the objective's safety score of an example x and σ(W) the standard deviation of the weight's own tensor
    ("Towards Identification and Intervention of Safety-Critical Parameters in LLMs", arXiv 2604.08297). The expectation
    is over signed gradients; the absolute value comes last.

    The model runs in evaluation mode, outside autocast, in the dtype of its weights; gradients add up in float32. It is
    left as it was found: gradients (the same objects), ``requires_grad``, the mode of every submodule, the cache
    setting, and all random number generators. Frozen weights are scored too. Beside the forward pass, memory is needed
    for the gradients of one batch and one float32 copy of the weights.

    Args:
        model: A causal language model. Under LoRA its base weights are scored.
        objective: What safety means, for instance `RefusalMargin()`.
        tokenizer: The model's tokenizer, with a chat template.
        batch_size: Examples in one pass. Changes memory and time, and the result by rounding only.
        reduction: ``"signed"``: |mean over examples of the gradient|, the paper's. ``"absolute"``: mean over examples
            of |gradient|, which runs one example at a time.
        scale: What that is multiplied by. ``"std"``: σ(W), the population standard deviation of the tensor, or of the
            expert's own slice where experts are fused. ``"magnitude"``: |W_i|. ``"none"``: 1.
        include: Score only weights whose names match one of these shell-style patterns.
        exclude: Leave out those whose names match one of these.
        show_progress: Whether a bar shows where this takes over two seconds.

    Returns:
        By canonical name, in ``named_parameters()`` order: scores of at least 0, float32, of the weight's shape and on
        its device. `scored_weights` says which weights there are.

    Raises:
        ValueError: An argument is not one of its choices, a pattern matches nothing, or the model has no weights that
            can be scored (quantised, sharded, without data).
        RuntimeError: The loss or a gradient is not finite (the message names batch and tensor), the loss does not
            depend on the weights, or the model uses reentrant gradient checkpointing.

    Example:
        >>> from lightning_safety.scoring import RefusalMargin
        >>> from tests.tiny import make_tiny_model, make_tiny_tokenizer
        >>> scores = expected_safety_impact(make_tiny_model(), RefusalMargin(limit=2), make_tiny_tokenizer())
        >>> scores["model.layers.0.self_attn.v_proj.weight"].shape
        torch.Size([16, 32])
    """
    _check_choice("reduction", reduction, get_args(Reduction))
    _check_choice("scale", scale, get_args(Scale))
    weights = scored_weights(model, include=include, exclude=exclude)
    absolute = reduction == "absolute"
    scores = _objective_gradients(model, objective, tokenizer, weights, batch_size, absolute, show_progress)
    for name, weight in weights.items():
        scores[name].abs_()
        if scale == "std":
            scores[name].mul_(weight_spread(weight))
        elif scale == "magnitude":
            scores[name].mul_(weight.detach().abs())
    return scores


def mean_gradients(
    model: nn.Module,
    objective: SafetyObjective,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int = 8,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    show_progress: bool = True,
) -> dict[str, Tensor]:
    """Return the gradient of the objective's loss, the mean over examples, for every weight that can be scored.

    Arguments, errors and what is left untouched are as for `expected_safety_impact`.

    Returns:
        By canonical name, float32, of the weight's shape and on its device.
    """
    weights = scored_weights(model, include=include, exclude=exclude)
    return _objective_gradients(model, objective, tokenizer, weights, batch_size, False, show_progress)


def _objective_gradients(
    model: nn.Module,
    objective: SafetyObjective,
    tokenizer: PreTrainedTokenizerBase,
    weights: dict[str, nn.Parameter],
    batch_size: int,
    absolute: bool,
    show_progress: bool,
) -> dict[str, Tensor]:
    check_positive(batch_size, "batch_size")
    with preserved_random_state(), _scoring_state(model, weights):
        objective.prepare(model, tokenizer)
        batches = objective.batches(tokenizer, batch_size=1 if absolute else batch_size)
        if not batches:
            raise ValueError("`objective` expected to have examples but has no batch. Give it at least one example.")
        return _mean_gradients(model, objective, batches, weights, absolute, show_progress)


def _mean_gradients(
    model: nn.Module,
    objective: SafetyObjective,
    batches: Sequence[ObjectiveBatch],
    weights: dict[str, nn.Parameter],
    absolute: bool,
    show_progress: bool,
) -> dict[str, Tensor]:
    """Return the mean over examples of the loss gradients, or of their absolute values. float32, by name."""
    device = next(iter(weights.values())).device
    sums = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}
    for number, batch in enumerate(track(batches, "Scoring weights", enabled=show_progress), start=1):
        place = f"batch {number} of {len(batches)}"
        if absolute and batch.examples != 1:
            raise ValueError(
                f"`objective` expected to give one example a batch for `batch_size=1` but {place} holds"
                f' {batch.examples}: `reduction="absolute"` needs the gradient of each example.'
            )
        _add_gradients(sums, weights, objective.loss(model, batch.to(device)), batch.examples, absolute, place)
    if not any(bool(total.any()) for total in sums.values()):
        raise RuntimeError("The gradient of `objective` is zero for every weight: there is nothing to rank them by.")
    examples = sum(batch.examples for batch in batches)
    return {name: total.div_(examples) for name, total in sums.items()}


def _add_gradients(
    sums: dict[str, Tensor],
    weights: dict[str, nn.Parameter],
    loss: Tensor,
    examples: int,
    absolute: bool,
    place: str,
) -> None:
    """Add one batch's gradients, weighed by its examples, and free them before the next batch makes its own."""
    value = float(loss.detach())
    if not math.isfinite(value):
        raise RuntimeError(
            f"The loss of `objective` is {value:g} in {place}. Check the model's weights and its dtype: float16"
            " often overflows, bfloat16 and float32 do not."
        )
    gradients = _gradients(loss, list(weights.values()))
    found = {name: gradient for name, gradient in zip(weights, gradients, strict=True) if gradient is not None}
    # The largest absolute entry is NaN or infinite if any is, and needs no copy.
    largest = [torch.linalg.vector_norm(gradient, ord=torch.inf).to(loss.device) for gradient in found.values()]
    for name, finite in zip(found, torch.stack(largest).isfinite().tolist() if largest else [], strict=True):
        if not finite:
            raise RuntimeError(
                f"The gradient of `{name}` is not finite in {place}, although the loss is {value:g}."
                " Score the model in float32 or bfloat16."
            )
    for name, gradient in found.items():
        sums[name].add_(gradient.abs_() if absolute else gradient, alpha=examples)


def _gradients(loss: Tensor, weights: list[nn.Parameter]) -> tuple[Tensor | None, ...]:
    """Return the gradient for each weight, None where the loss does not depend on it (an expert no token reached)."""
    if not loss.requires_grad:
        raise RuntimeError(
            "The loss of `objective` does not depend on the weights to score: it has no gradient. Compute it from the"
            " model's output, without `torch.no_grad()` or `.detach()`."
        )
    if _has_reentrant_checkpoint(loss):
        raise RuntimeError(
            "Reentrant gradient checkpointing hides the weights inside of it from gradients by weight. Turn it off"
            " while scoring, or use the non-reentrant one (`use_reentrant=False`)."
        )
    # Neither `.grad` nor the hooks that act on it (DDP, gradient accumulation, held weights) are touched.
    return torch.autograd.grad(loss, weights, allow_unused=True)


def _has_reentrant_checkpoint(loss: Tensor) -> bool:
    """Whether a step of the computation is a reentrant checkpoint: its weights would silently count as unused."""
    found: list[Any] = [loss.grad_fn]
    seen = set()
    while found:
        node = found.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "CheckpointFunctionBackward":
            return True
        found.extend(following for following, _ in node.next_functions)
    return False


@contextmanager
def _scoring_state(model: nn.Module, weights: dict[str, nn.Parameter]) -> Iterator[None]:
    """Evaluation mode, full precision and gradients for all `weights`, whatever surrounds the call; then as before."""
    frozen = [weight for weight in weights.values() if not weight.requires_grad]
    devices = {weight.device.type for weight in weights.values()}
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for device in devices:
            stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(evaluation_mode(model, use_cache=False))
        try:
            for weight in frozen:
                weight.requires_grad_(True)
            yield
        finally:
            for weight in frozen:
                weight.requires_grad_(False)


def _check_choice(argument: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(
            f"`{argument}` expected to be one of {', '.join(map(repr, choices))} but got {value!r}."
            f" {closest(str(value), choices)}"
        )
