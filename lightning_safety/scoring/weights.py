# SPDX-License-Identifier: Apache-2.0
"""Which weights of a model are scored, and how widely each tensor's values spread."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_safety.arguments import closest
from lightning_safety.language.find import canonical_name, named_weights
from lightning_safety.language.quantized import check_quantization_supported, is_quantized_weight
from lightning_safety.processes import sum_over_processes
from lightning_safety.scoring.mixture import Mixture, MixtureLayout, find_mixture, fused_parameters, in_adapter
from lightning_safety.scoring.shards import exchange_device, is_sharded, local_part

_SCORED_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_NEVER_SCORED = "Biases, norms, embeddings, a tied output head, expert routers and adapters are never scored."
_SCORE_UNQUANTISED = (
    "Quantised weights can be scored only where bitsandbytes made them (NF4, FP4, int8): score the model loaded in"
    " bfloat16 or float32, and pass the saved mask."
)
# Copies in float64 of so many stay in a processor's cache and in blocks that the allocator keeps: a tenth of the time.
_CHUNK_ENTRIES = 2**18


def scored_weights(
    model: nn.Module,
    *,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    mixture: MixtureLayout | None = None,
) -> dict[str, nn.Parameter]:
    """Return the weights that can be scored, by canonical name, in ``named_parameters()`` order.

    These are the weights of linear layers (attention, MLP, experts, an untied output head) and fused expert weights of
    shape [experts, …, …]. Biases, norms, embeddings, a tied output head, expert routers and adapters are left out
    ("Towards Identification and Intervention of Safety-Critical Parameters in LLMs", arXiv 2604.08297).

    A weight that bitsandbytes quantised (NF4, FP4, int8) is returned as it is stored: `weight_shape` gives its shape,
    `dequantized_weight` its values.

    Args:
        model: A causal language model.
        include: Shell-style patterns of names, for instance ``"*.mlp.*"``. Default: all.
        exclude: Patterns of names to leave out of those. Default: none.
        mixture: Where the experts and routers of a mixture of experts are. Default: by a table of model families.

    Raises:
        ValueError: A pattern matches nothing (the message shows close names), nothing is left to score, a weight is
            sharded by DeepSpeed, without data, or quantised by something else than bitsandbytes, or the model seems to
            have experts and neither the table nor `mixture` says where.

    Example:
        >>> from tests.tiny import make_tiny_model
        >>> list(scored_weights(make_tiny_model(), include="*.0.self_attn.[qk]_proj.weight"))
        ['model.layers.0.self_attn.q_proj.weight', 'model.layers.0.self_attn.k_proj.weight']
    """
    # GPTQ, AWQ and their like keep packed weights in layers of their own: only the head would be left to score.
    check_quantization_supported(model)
    scorable = _scorable_parameters(model, find_mixture(model, mixture))
    candidates = {name: weight for name, weight in named_weights(model).items() if id(weight) in scorable}
    if not candidates:
        raise ValueError(
            f"`model` expected to have linear layers but {type(model).__name__} has none whose weight can be scored."
            f" {_NEVER_SCORED}"
        )
    included = _matching("include", include, candidates) if include is not None else set(candidates)
    excluded = _matching("exclude", exclude, candidates) if exclude is not None else set()
    weights = {name: weight for name, weight in candidates.items() if name in included - excluded}
    if not weights:
        raise ValueError(
            f"`include` and `exclude` expected to leave weights to score but none of {len(candidates)} is left."
            " Exclude less."
        )
    for name, weight in weights.items():
        _check_readable(name, weight)
    return weights


def weight_spread(weight: Tensor) -> Tensor:
    """Return the population standard deviation σ of a weight, of each expert's slice where the experts are fused.

    Args:
        weight: [out, in] or [experts, out, in]. One [out, in] may be sharded; then every process must call this.

    Returns:
        float32, computed in float64; shape [] or [experts, 1, 1], so that it multiplies a score of the same weight.

    Example:
        >>> weight_spread(torch.tensor([[1.0, 3.0]]))
        tensor(1.)
    """
    if weight.dim() == 3:
        return torch.stack([weight_spread(expert) for expert in weight]).view(-1, 1, 1)
    flat = local_part(weight.detach()).reshape(-1)
    mean = _sum_of_parts((chunk.sum() for chunk in _in_float64(flat)), weight) / weight.numel()
    variance = _sum_of_parts(((chunk - mean).square_().sum() for chunk in _in_float64(flat)), weight) / weight.numel()
    return variance.sqrt().to(weight.device, torch.float32)


def _sum_of_parts(parts: Iterable[Tensor], weight: Tensor) -> Tensor:
    """Return a sum in float64, over all processes where the weight is sharded."""
    total = torch.zeros((), dtype=torch.float64, device="cpu" if weight.device.type == "mps" else weight.device)
    for part in parts:
        total += part
    if is_sharded([weight]):
        sum_over_processes([total], device=exchange_device(weight))
    return total


def _in_float64(flat: Tensor) -> Iterator[Tensor]:
    """Yield copies of a vector in parts, so that a large tensor is never doubled as a whole."""
    for chunk in torch.split(flat, _CHUNK_ENTRIES):
        # Apple's GPUs have no float64.
        yield (chunk.cpu() if chunk.device.type == "mps" else chunk).double()


def _scorable_parameters(model: nn.Module, mixture: Mixture) -> set[int]:
    """Return the identities of the weights of linear layers and fused experts, less what is never scored."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    scorable = set()
    for path, module in model.named_modules():
        name = canonical_name(path)
        if mixture.in_router(name) or in_adapter(name):
            continue
        if isinstance(module, nn.Linear | Conv1D):
            scorable.add(id(module.weight))
        elif mixture.in_fused_experts(name):
            scorable |= {id(weight) for _, weight in fused_parameters(module)}
    return scorable - embeddings


def _matching(argument: str, patterns: str | Sequence[str], names: Iterable[str]) -> set[str]:
    """Return the names that any of the patterns matches."""
    matched: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"`{argument}` expected to be a pattern or a list of patterns but got {pattern!r}.")
        found = fnmatch.filter(names, pattern)
        if not found:
            raise ValueError(
                f"`{argument}` expected to match names of scored weights but {pattern!r} matches none."
                f" {closest(pattern, names)} Patterns are shell-style and match the whole name, for instance"
                f" '*v_proj*'. {_NEVER_SCORED}"
            )
        matched.update(found)
    return matched


def _check_readable(name: str, weight: nn.Parameter) -> None:
    """Refuse weights whose values cannot be read, or that are not all here."""
    if weight.dtype not in _SCORED_DTYPES and not is_quantized_weight(weight):
        raise ValueError(
            f"`model` expected to have floating-point weights but `{name}` is {weight.dtype}. {_SCORE_UNQUANTISED}"
        )
    if weight.is_meta:
        raise ValueError(
            f"`model` expected to hold its weights but `{name}` is on the meta device. Load them before scoring."
        )
    # DeepSpeed ZeRO-3 leaves an empty tensor with a `ds_id` where a weight was.
    if hasattr(weight, "ds_id") or not weight.numel():
        raise ValueError(
            f"`model` expected to hold its weights whole but `{name}` is sharded. Score the model unsharded, for"
            " instance with `lightning-safety score`, and pass the saved mask."
        )
    # torchao's dtype is that of the dense weight.
    if type(local_part(weight.data)) is not Tensor and not is_quantized_weight(weight):
        raise ValueError(
            f"`model` expected to have plain weights but `{name}` is a {type(weight.data).__name__}."
            f" {_SCORE_UNQUANTISED}"
        )
