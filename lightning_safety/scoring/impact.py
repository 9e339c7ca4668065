# SPDX-License-Identifier: Apache-2.0
"""Expected Safety Impact: how much each weight of a model matters for a safety objective."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, get_args

from torch import Tensor, nn

from lightning_safety.arguments import check_choice
from lightning_safety.language.quantized import dequantized_weight, quantized_layers
from lightning_safety.scoring.experts import find_reached, unscore_unreached
from lightning_safety.scoring.gradient_sums import GradientSums
from lightning_safety.scoring.lean import AccumulateDtype, AccumulateOn, Autocast, LeanScoring
from lightning_safety.scoring.mixture import MixtureLayout, find_mixture
from lightning_safety.scoring.objective import SafetyObjective
from lightning_safety.scoring.shards import is_sharded, local_part, reshard, sharded_scores
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
    shared: bool = False,
    show_progress: bool = True,
) -> Mapping[str, Tensor]:
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
        shared: Whether the processes of torch's default group call this together: they share out the examples. Each has
            a copy of the same model on its own device, and all return the same scores; or FSDP2 has sharded it, and
            each returns its parts (`ShardedScores`).
        show_progress: Whether a bar shows where this takes over two seconds.

    Returns:
        By canonical name, in ``named_parameters()`` order: scores of at least 0, of the weight's shape in the layer
        (`weight_shape`), float32 and on the weight's device unless chosen otherwise. `scored_weights` says which
        weights there are. NaN for experts that no token reached: nothing is known of these.

    Raises:
        ValueError: An argument is not one of its choices, a pattern matches nothing, or the model has no weights that
            can be scored (sharded in an unknown way, without data, quantised by something else than bitsandbytes or
            repacked by it), or has experts and neither its family nor `mixture` says where. Processes have different
            examples.
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
    reshard(model)
    lean = LeanScoring(passes, accumulate_on, accumulate_dtype, autocast)
    weights = scored_weights(model, include=include, exclude=exclude, mixture=mixture)
    experts = find_mixture(model, mixture)
    if experts.experts and is_sharded(weights.values()):
        raise ValueError(
            "`model` expected to have no experts where it is sharded. Score it on one device, for instance with"
            " `lightning-safety score`, and pass the saved mask."
        )
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
                dense = dense if scale == "std" else local_part(dense)
                score.mul_((weight_spread(dense) if scale == "std" else dense.abs()).to(score.device))

    sums = GradientSums(model, objective, batch_size, reduction == "absolute", lean, shared, show_progress)
    scores = sums.mean(tokenizer, weights, finish)
    unscore_unreached(scores, experts, reached)
    return sharded_scores(scores, weights) if is_sharded(weights.values()) else scores


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
    reshard(model)
    weights = scored_weights(model, include=include, exclude=exclude, mixture=mixture)
    sums = GradientSums(model, objective, batch_size, shared=shared, show_progress=show_progress)
    return sums.mean(tokenizer, weights)
