# SPDX-License-Identifier: Apache-2.0
"""Expected Safety Impact: how much each weight of a model matters for a safety objective."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_safety.arguments import check_choice, check_positive
from lightning_safety.language.modes import evaluation_mode, uncompiled
from lightning_safety.language.quantized import (
    dequantized_weight,
    exact_inputs,
    keep_unpacked,
    quantized_layers,
    weight_shape,
)
from lightning_safety.processes import check_alike, share_of, sum_over_processes, together
from lightning_safety.progress import track
from lightning_safety.randomness import preserved_random_state
from lightning_safety.scoring.experts import unscore_unreached
from lightning_safety.scoring.finite import has_finite_norm, is_finite
from lightning_safety.scoring.layer_gradients import WeightGradients
from lightning_safety.scoring.mixture import MixtureLayout, find_mixture
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
    mixture: MixtureLayout | None = None,
    shared: bool = False,
    show_progress: bool = True,
) -> dict[str, Tensor]:
    r"""Score every weight by the Expected Safety Impact (ESI).

    .. math:: \mathrm{ESI}_i = \sigma(W) \cdot \left| \mathbb{E}_x\, \partial S(x; \theta) / \partial \theta_i \right|

    with S the objective's safety score of an example x and σ(W) the standard deviation of the weight's own tensor
    ("Towards Identification and Intervention of Safety-Critical Parameters in LLMs", arXiv 2604.08297). The expectation
    is over signed gradients; the absolute value comes last.

    The model runs in evaluation mode, outside autocast, in the dtype of its weights; gradients add up in float32. It is
    left as it was found: gradients (the same objects), ``requires_grad``, the mode of every submodule, the cache
    setting, and all random number generators. Frozen weights are scored too, and so are those that bitsandbytes
    quantised, as the dequantised ones, with inputs that are not quantised; `keep_unpacked` is called for these. Beside
    the forward pass, memory is needed for one float32 copy of the weights and the gradient of one of them.

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
        mixture: Where the experts and routers of a mixture of experts are. Default: by a table of model families.
        shared: Whether the processes of torch's default group call this together, each with a copy of the same
            model and on its own device: they share out the examples, and all return the same scores.
        show_progress: Whether a bar shows where this takes over two seconds.

    Returns:
        By canonical name, in ``named_parameters()`` order: scores of at least 0, float32, on the weight's device and of
        its shape in the layer (`weight_shape`). `scored_weights` says which weights there are. NaN for experts that no
        token reached: nothing is known of these.

    Raises:
        ValueError: An argument is not one of its choices, a pattern matches nothing, or the model has no weights that
            can be scored (sharded, without data, quantised by something else than bitsandbytes or repacked by it), or
            has experts and neither its family nor `mixture` says where. Processes have different examples.
        RuntimeError: The loss or a gradient is not finite (the message names batch and tensor), the loss does not
            depend on the weights, or the model uses reentrant gradient checkpointing. Another process failed.

    Example:
        >>> from lightning_safety.scoring import RefusalMargin
        >>> from tests.tiny import make_tiny_model, make_tiny_tokenizer
        >>> scores = expected_safety_impact(make_tiny_model(), RefusalMargin(limit=2), make_tiny_tokenizer())
        >>> scores["model.layers.0.self_attn.v_proj.weight"].shape
        torch.Size([16, 32])
    """
    check_choice(reduction, "reduction", get_args(Reduction))
    check_choice(scale, "scale", get_args(Scale))
    weights = scored_weights(model, include=include, exclude=exclude, mixture=mixture)
    absolute = reduction == "absolute"
    scores = _objective_gradients(model, objective, tokenizer, weights, batch_size, absolute, show_progress, shared)
    unscore_unreached(scores, find_mixture(model, mixture))
    layers = {id(layer.weight): layer for _, layer in quantized_layers(model)}
    for name, weight in weights.items():
        scores[name].abs_()
        if scale != "none":
            dense = dequantized_weight(layers[id(weight)]) if id(weight) in layers else weight.detach()
            scores[name].mul_(weight_spread(dense) if scale == "std" else dense.abs())
    return scores


def mean_gradients(
    model: nn.Module,
    objective: SafetyObjective,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int = 8,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    mixture: MixtureLayout | None = None,
    shared: bool = False,
    show_progress: bool = True,
) -> dict[str, Tensor]:
    """Return the gradient of the objective's loss, the mean over examples, for every weight that can be scored.

    Arguments, errors and what is left untouched are as for `expected_safety_impact`.

    Returns:
        By canonical name, float32, on the weight's device and of its shape in the layer.
    """
    weights = scored_weights(model, include=include, exclude=exclude, mixture=mixture)
    return _objective_gradients(model, objective, tokenizer, weights, batch_size, False, show_progress, shared)


def _objective_gradients(
    model: nn.Module,
    objective: SafetyObjective,
    tokenizer: PreTrainedTokenizerBase,
    weights: dict[str, nn.Parameter],
    batch_size: int,
    absolute: bool,
    show_progress: bool,
    shared: bool,
) -> dict[str, Tensor]:
    check_positive(batch_size, "batch_size")
    keep_unpacked(model)
    with preserved_random_state(), _scoring_state(model, weights):
        objective.prepare(model, tokenizer)
        batches = objective.batches(tokenizer, batch_size=1 if absolute else batch_size)
        if not batches:
            raise ValueError("`objective` expected to have examples but has no batch. Give it at least one example.")
        if shared:
            check_alike(_digest(batches), "objective", "Give every process the same prompts, in the same order.")
        return _mean_gradients(model, objective, batches, weights, absolute, show_progress, shared)


def _mean_gradients(
    model: nn.Module,
    objective: SafetyObjective,
    batches: Sequence[ObjectiveBatch],
    weights: dict[str, nn.Parameter],
    absolute: bool,
    show_progress: bool,
    shared: bool,
) -> dict[str, Tensor]:
    """Return the mean over examples of the loss gradients, or of their absolute values. float32, by name."""
    device = next(iter(weights.values())).device
    sums = {
        name: torch.zeros(weight_shape(weight), dtype=torch.float32, device=weight.device)
        for name, weight in weights.items()
    }
    finite: dict[str, Tensor] = {}
    examples = 0  # of the present batch

    def add(name: str, gradient: Tensor) -> None:
        # What is not finite stays so in the sum, which is there to be looked at again.
        finite[name] = has_finite_norm(sums[name].add_(gradient.abs() if absolute else gradient, alpha=examples))

    numbered = list(enumerate(batches, start=1))
    share = share_of(numbered) if shared else numbered
    alone = together("Scoring weights") if shared else nullcontext()
    with alone, exact_inputs(model), WeightGradients(model, weights, add) as gradients:
        for number, batch in track(share, "Scoring weights", enabled=show_progress):
            place = f"batch {number} of {len(batches)}"
            if absolute and batch.examples != 1:
                raise ValueError(
                    f"`objective` expected to give one example a batch for `batch_size=1` but {place} holds"
                    f' {batch.examples}: `reduction="absolute"` needs the gradient of each example.'
                )
            examples = batch.examples
            loss = objective.loss(model, batch.to(device))
            _check_loss(loss, place)
            finite.clear()
            gradients.backward(loss)
            _check_gradients(finite, sums, loss, place)
    if shared:
        sum_over_processes(sums.values())
    if not any(bool(total.any()) for total in sums.values()):
        raise RuntimeError("The gradient of `objective` is zero for every weight: there is nothing to rank them by.")
    total_examples = sum(batch.examples for batch in batches)
    return {name: total.div_(total_examples) for name, total in sums.items()}


def _check_loss(loss: Tensor, place: str) -> None:
    value = float(loss.detach())
    if not math.isfinite(value):
        raise RuntimeError(
            f"The loss of `objective` is {value:g} in {place}. Check the model's weights and its dtype: float16"
            " often overflows, bfloat16 and float32 do not."
        )


def _check_gradients(finite: dict[str, Tensor], sums: dict[str, Tensor], loss: Tensor, place: str) -> None:
    """Refuse a batch after which a sum, by name, is not finite. One question to the device for all norms."""
    answers = torch.stack([answer.to(loss.device) for answer in finite.values()]).tolist() if finite else []
    for name, answer in zip(finite, answers, strict=True):
        if not answer and not is_finite(sums[name]):
            raise RuntimeError(
                f"The gradient of `{name}` is not finite in {place}, although the loss is {float(loss.detach()):g}."
                " Score the model in float32 or bfloat16."
            )


def _digest(batches: Sequence[ObjectiveBatch]) -> str:
    """Return a digest of all that batches hold."""
    digest = hashlib.sha256()
    for batch in batches:
        for name, tensor in batch.tensors.items():
            digest.update(f"{batch.examples} {name} {tensor.dtype} {list(tensor.shape)} {tensor.tolist()}".encode())
    return digest.hexdigest()


@contextmanager
def _scoring_state(model: nn.Module, weights: dict[str, nn.Parameter]) -> Iterator[None]:
    """Evaluation mode, full precision, gradients and uncompiled code, whatever surrounds the call; then as before."""
    devices = {weight.device.type for weight in weights.values()}
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for device in devices:
            stack.enter_context(torch.autocast(device, enabled=False))
        # Compiled code would leave out the hooks that find gradients.
        stack.enter_context(uncompiled())
        stack.enter_context(evaluation_mode(model, use_cache=False))
        yield
