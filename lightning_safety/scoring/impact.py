# SPDX-License-Identifier: Apache-2.0
"""Expected Safety Impact: how much each weight of a model matters for a safety objective."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
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
)
from lightning_safety.progress import track
from lightning_safety.randomness import preserved_random_state
from lightning_safety.scoring.experts import find_reached, unscore_unreached
from lightning_safety.scoring.finite import has_finite_norm, is_finite
from lightning_safety.scoring.layer_gradients import WeightGradients
from lightning_safety.scoring.lean import AccumulateDtype, AccumulateOn, Autocast, LeanScoring, weight_blocks
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
    passes: int = 1,
    accumulate_on: AccumulateOn = "device",
    accumulate_dtype: AccumulateDtype = "float32",
    autocast: Autocast | None = None,
    show_progress: bool = True,
) -> dict[str, Tensor]:
    r"""Score every weight by the Expected Safety Impact (ESI).

    .. math:: \mathrm{ESI}_i = \sigma(W) \cdot \left| \mathbb{E}_x\, \partial S(x; \theta) / \partial \theta_i \right|

    with S the objective's safety score of an example x and σ(W) the standard deviation of the weight's own tensor
    ("Towards Identification and Intervention of Safety-Critical Parameters in LLMs", arXiv 2604.08297). The expectation
    is over signed gradients; the absolute value comes last.

    The model runs in evaluation mode, in the dtype of its weights whatever autocast surrounds the call, and gradients
    add up in float32, unless `autocast` and `accumulate_dtype` say otherwise. It is left as it was found: gradients
    (the same objects), ``requires_grad``, the mode of every submodule, the cache setting, and all random number
    generators. Frozen weights are scored too, and so are those that bitsandbytes quantised, as the dequantised ones,
    with inputs that are not quantised; `keep_unpacked` is called for these. Beside the forward pass, memory is needed
    for one float32 copy of the weights, and for their gradients where rows share what they begin with, else for that of
    one. `passes`, `accumulate_on` and `accumulate_dtype` make it less (`LeanScoring` says what these cost);
    `estimate_scoring_memory` says how much it is.

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
        passes: Score in at most so many blocks of weights, one pass over all examples for each. With several, scores
            come back on the CPU.
        accumulate_on: ``"device"``: sums and scores are where the weight is. ``"cpu"``: in main memory.
        accumulate_dtype: Of sums and scores, ``"float32"`` or ``"bfloat16"``.
        autocast: ``"bfloat16"``: compute losses and gradients under autocast.
        show_progress: Whether a bar shows where this takes over two seconds.

    Returns:
        By canonical name, in ``named_parameters()`` order: scores of at least 0, of the weight's shape in the layer
        (`weight_shape`), float32 and on the weight's device unless chosen otherwise. `scored_weights` says which
        weights there are. NaN for experts that no token reached: nothing is known of these.

    Raises:
        ValueError: An argument is not one of its choices, a pattern matches nothing, or the model has no weights that
            can be scored (sharded, without data, quantised by something else than bitsandbytes or repacked by it), or
            has experts and neither its family nor `mixture` says where.
        RuntimeError: The loss or a gradient is not finite (the message names batch and tensor), the loss does not
            depend on the weights, or the model uses reentrant gradient checkpointing.

    Example:
        >>> from lightning_safety.scoring import RefusalMargin
        >>> from tests.tiny import make_tiny_model, make_tiny_tokenizer
        >>> scores = expected_safety_impact(make_tiny_model(), RefusalMargin(limit=2), make_tiny_tokenizer())
        >>> scores["model.layers.0.self_attn.v_proj.weight"].shape
        torch.Size([16, 32])
    """
    check_choice(reduction, "reduction", get_args(Reduction))
    check_choice(scale, "scale", get_args(Scale))
    lean = LeanScoring(passes, accumulate_on, accumulate_dtype, autocast)
    weights = scored_weights(model, include=include, exclude=exclude, mixture=mixture)
    absolute = reduction == "absolute"
    experts = find_mixture(model, mixture)
    layers = {id(layer.weight): layer for _, layer in quantized_layers(model)}
    reached: dict[tuple[str, str], bool] = {}

    def finish(gradients: dict[str, Tensor]) -> None:
        # Before scaling: a weight that is zero everywhere has no spread but may have been reached.
        find_reached(gradients, experts, reached)
        for name, score in gradients.items():
            score.abs_()
            if scale != "none":
                weight = weights[name]
                dense = dequantized_weight(layers[id(weight)]) if id(weight) in layers else weight.detach()
                score.mul_((weight_spread(dense) if scale == "std" else dense.abs()).to(score.device))

    scores = _objective_gradients(
        model, objective, tokenizer, weights, batch_size, absolute, show_progress, lean, finish
    )
    unscore_unreached(scores, experts, reached)
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
    show_progress: bool = True,
) -> dict[str, Tensor]:
    """Return the gradient of the objective's loss, the mean over examples, for every weight that can be scored.

    Arguments, errors and what is left untouched are as for `expected_safety_impact`.

    Returns:
        By canonical name, float32, on the weight's device and of its shape in the layer.
    """
    weights = scored_weights(model, include=include, exclude=exclude, mixture=mixture)
    return _objective_gradients(model, objective, tokenizer, weights, batch_size, False, show_progress, LeanScoring())


def _objective_gradients(
    model: nn.Module,
    objective: SafetyObjective,
    tokenizer: PreTrainedTokenizerBase,
    weights: dict[str, nn.Parameter],
    batch_size: int,
    absolute: bool,
    show_progress: bool,
    lean: LeanScoring,
    finish: Callable[[dict[str, Tensor]], object] = lambda _: None,
) -> dict[str, Tensor]:
    """Return the mean gradients of all blocks of weights; `finish` changes those of a block in place."""
    check_positive(batch_size, "batch_size")
    keep_unpacked(model)
    with preserved_random_state(), _scoring_state(model, weights):
        objective.prepare(model, tokenizer)
        batches = objective.batches(tokenizer, batch_size=1 if absolute else batch_size)
        if not batches:
            raise ValueError("`objective` expected to have examples but has no batch. Give it at least one example.")
        objective = lean.wrap(objective)
        blocks = weight_blocks(weights, lean.passes)
        found: dict[str, Tensor] = {}
        moved = False
        for block in blocks:
            # Every pass draws what the only one would draw.
            with preserved_random_state():
                gradients = _mean_gradients(
                    model, objective, batches, block, absolute, show_progress, lean, partly=len(blocks) > 1
                )
            moved = moved or any(bool(gradient.any()) for gradient in gradients.values())
            finish(gradients)
            for name in block:
                # Left where they are, or held by a name, they would stand beside the sums of the next block.
                found[name] = gradients.pop(name) if len(blocks) == 1 else gradients.pop(name).cpu()
    if not moved:
        raise RuntimeError("The gradient of `objective` is zero for every weight: there is nothing to rank them by.")
    return found


def _mean_gradients(
    model: nn.Module,
    objective: SafetyObjective,
    batches: Sequence[ObjectiveBatch],
    weights: dict[str, nn.Parameter],
    absolute: bool,
    show_progress: bool,
    lean: LeanScoring,
    *,
    partly: bool,
) -> dict[str, Tensor]:
    """Return the mean over examples of the loss gradients, or of their absolute values, by name.

    Where the weights are only part of the model's, the loss may depend on none of them: `partly`.
    """
    # That of the embedding, where the model is spread over devices.
    device = next(model.parameters()).device
    sums = {name: lean.zeros(weight) for name, weight in weights.items()}
    finite: dict[str, Tensor] = {}
    examples = 0  # of the present batch

    def add(name: str, gradient: Tensor) -> None:
        gradient = (gradient.abs() if absolute else gradient).to(sums[name].device)
        # What is not finite stays so in the sum, which is there to be looked at again.
        finite[name] = has_finite_norm(sums[name].add_(gradient, alpha=examples))

    with exact_inputs(model), WeightGradients(model, weights, add, partly=partly) as gradients:
        for number, batch in enumerate(track(batches, "Scoring weights", enabled=show_progress), start=1):
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
            # What a backward pass did not reach would stay in memory beside the next batch.
            del loss
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
