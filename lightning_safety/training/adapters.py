# SPDX-License-Identifier: Apache-2.0
"""LoRA in modules that train: putting adapters on, what checkpoints hold of them, and the model without them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lightning_safety.arguments import closest
from lightning_safety.enforcement.adapters import has_adapters
from lightning_safety.enforcement.delta_layer import delta_layers
from lightning_safety.language import canonical_name
from lightning_safety.language.quantized import is_quantized_weight

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

LORA_ARGUMENTS = (
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "target_parameters",
    "modules_to_save",
    "bias",
    "lora_bias",
    "use_rslora",
    "use_dora",
    "init_lora_weights",
    "fan_in_fan_out",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
)
"""The arguments of `peft.LoraConfig` that a checkpoint describes whole: plain values that leave the base as it is."""

_INITIALISATIONS = ("gaussian", "orthogonal")
_NAMES_SHOWN = 3
_SAMPLED_ENTRIES = 1024


def check_lora(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments of `peft.LoraConfig` that `CausalLanguageModule` takes, after a check.

    Raises:
        TypeError: They are no mapping, or a number is none.
        ValueError: One is unknown (the message lists the closest), is not supported here, or is out of range.

    Example:
        >>> check_lora({"r": 8, "lora_droput": 0.1})
        Traceback (most recent call last):
        ...
        ValueError: `lora` expected to hold arguments of `peft.LoraConfig` but got 'lora_droput'. \
Did you mean `lora_dropout`?
    """
    if not isinstance(arguments, Mapping):
        raise TypeError(
            f"`lora` expected to be a mapping of `peft.LoraConfig`'s arguments but got {arguments!r}. For instance,"
            " `lora={'r': 8, 'lora_alpha': 32}`, or `{}` for peft's defaults on all linear layers."
        )
    for name in arguments:
        if name not in LORA_ARGUMENTS:
            raise ValueError(_unknown(name))
    values = dict(arguments)
    rank, dropout, start = values.get("r", 8), values.get("lora_dropout", 0.0), values.get("init_lora_weights", True)
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"`lora['r']`, the rank, expected to be an integer of at least 1 but got {rank!r}.")
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise ValueError(f"`lora['lora_dropout']` expected to be a number in [0, 1) but got {dropout!r}.")
    if not isinstance(start, bool) and start not in _INITIALISATIONS:
        raise ValueError(
            f"`lora['init_lora_weights']` expected to be a boolean or one of {_INITIALISATIONS} but got {start!r}."
            " Others begin from data or change the base weights, which a checkpoint of adapters alone cannot describe."
        )
    try:
        plain: dict[str, Any] = json.loads(json.dumps(values))
    except TypeError as error:
        raise TypeError(f"`lora` expected to hold plain values, as YAML has them, but: {error}.") from None
    return plain


def add_lora(model: PreTrainedModel, arguments: Mapping[str, Any]) -> PeftModel:
    """Put LoRA adapters on a model, quantised or not, and freeze everything else.

    Args:
        model: The base model; its layers are wrapped in place.
        arguments: As `check_lora` returned them. Without ``target_modules``, and without ``target_parameters``, all
            linear layers but the output head get one.

    Raises:
        ValueError: The model has adapters already, or peft finds no layer of such a name.
    """
    from peft import LoraConfig, get_peft_model

    if has_adapters(model):
        raise ValueError(
            "`lora` expected a model without adapters but `source` has some. Leave out `lora` to train those, or pass"
            " the base model."
        )
    defaults: dict[str, Any] = {} if "target_parameters" in arguments else {"target_modules": "all-linear"}
    return get_peft_model(model, LoraConfig(**defaults | dict(arguments), task_type="CAUSAL_LM"))


def base_names(module: nn.Module) -> set[str]:
    """Return the names in ``module.state_dict()`` of what adapters are put on, which no training changes.

    Left are adapters, copies that train (``modules_to_save``), buffers, and weights of the base that require a gradient
    (biases, ``bias="all"``).
    """
    adapters = _adapter_prefixes(module)
    weights = dict(module.named_parameters(remove_duplicate=False))
    names = {name for name, weight in weights.items() if not weight.requires_grad and not name.startswith(adapters)}
    # bitsandbytes keeps scales beside a quantised weight: `weight.absmax`, `SCB`.
    quantized = tuple(f"{name.rpartition('.')[0]}." for name in names if is_quantized_weight(weights[name]))
    buffers = dict(module.named_buffers(remove_duplicate=False))
    beside = (name for name in module.state_dict() if name not in weights and name not in buffers)
    return names | {name for name in beside if name.startswith(quantized)}


def check_loaded(result: Any, base: Collection[str]) -> None:
    """Make sure that a checkpoint held all of a module but, at most, its base.

    Args:
        result: What ``load_state_dict(…, strict=False)`` returned.
        base: `base_names` of the module.

    Raises:
        ValueError: Something was missing, or had no place in the module.
    """
    missing = [name for name in result.missing_keys if name not in base]
    if missing or result.unexpected_keys:
        raise ValueError(
            f"`checkpoint` expected to hold the adapters of this module but {len(missing)} of its weights are missing"
            f" and {len(result.unexpected_keys)} others are there, such as"
            f" {[*missing, *result.unexpected_keys][:_NAMES_SHOWN]}. Use the same `lora` and `quantization` as the fit"
            " that saved it."
        )


def sample_base(model: nn.Module) -> dict[str, str]:
    """Return a fingerprint of each unquantised weight of the base, by canonical name, from 1,024 of its entries.

    A checkpoint of adapters says so which base they belong to, at the cost of milliseconds.
    """
    names = base_names(model)
    samples = {}
    for name, weight in model.named_parameters():
        if name in names and not is_quantized_weight(weight):
            step = max(1, weight.numel() // _SAMPLED_ENTRIES)
            entries = weight.detach().reshape(-1)[::step].cpu().contiguous()
            digest = hashlib.sha256(f"{weight.dtype}{list(weight.shape)}".encode())
            digest.update(entries.view(torch.uint8).numpy().data)
            samples[canonical_name(name)] = digest.hexdigest()[:16]
    return samples


def check_base(found: Mapping[str, str] | None, expected: Mapping[str, str]) -> None:
    """Make sure that adapters of a checkpoint are put on the base they were trained on.

    Args:
        found: `sample_base` of the model at hand; None if that has no adapters.
        expected: That of the model which was trained. Weights that only one of them has are not compared: they are
            quantised in the other.

    Raises:
        ValueError: A weight differs.
    """
    if found is None:
        raise ValueError(
            "`checkpoint` expected to hold a whole model but holds adapters alone. Pass the `lora` and `quantization`"
            " of the fit that saved it, or make a model of it with `lightning-safety export`."
        )
    common = found.keys() & expected.keys()
    different = sorted(name for name in common if found[name] != expected[name])
    if different:
        raise ValueError(
            f"`checkpoint` expected the base model that its adapters were trained on but {len(different)} of"
            f" {len(common)} of its weights differ, such as `{different[0]}`. Load the same model, of the same"
            " revision, with the same `dtype`."
        )


@contextmanager
def adapters_off(model: Any) -> Iterator[None]:
    """Make a PeftModel compute what its base computes, without dropout; afterwards all is as it was."""
    from lightning_safety.language import evaluation_mode

    required = [(weight, weight.requires_grad) for weight in model.parameters()]
    try:
        with evaluation_mode(model), model.disable_adapter():
            yield
    finally:
        # peft switches gradients too, and on again for what was frozen before.
        for weight, value in required:
            if weight.requires_grad != value:
                weight.requires_grad_(value)


def check_off_is_start(model: Any, *, begun: bool) -> None:
    """Make sure that a PeftModel with its adapters off is the model that training starts from.

    Args:
        model: A PeftModel.
        begun: Whether its adapters may be trained already.

    Raises:
        ValueError: The adapters add something already, or weights of the base train too.
    """
    adapters = _adapter_prefixes(model)
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    base = [canonical_name(name) for name in trained if not name.startswith(adapters)]
    # Weights that train beside a frozen or quantised base are none of its parameters.
    base += [acting.name for _, acting in delta_layers(model)]
    if base:
        raise ValueError(
            f"`retention_weight` expected adapters on a base that stands still but {len(base)} of its weights train,"
            f" such as `{base[0]}`. Leave out `bias` in `lora`, `SafetyEnhancementTuning`, or `retention_weight`."
        )
    if not begun and any(bool(weight.any()) for name, weight in model.named_parameters() if ".lora_B." in name):
        raise ValueError(
            "`retention_weight` expected adapters that add nothing yet but they do: the start model would not be the"
            " model without them. Merge them into the base and begin new ones, or leave out `retention_weight`."
        )


def is_peft_model(model: Any) -> bool:
    """Whether a model is one of peft's, around a base model."""
    return isinstance(getattr(model, "peft_config", None), Mapping) and callable(getattr(model, "get_base_model", None))


def _adapter_prefixes(module: nn.Module) -> tuple[str, ...]:
    """Return how names of what adapters consist of begin, copies of whole layers included."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return tuple(
        f"{path}.{part}."
        for path, layer in module.named_modules()
        if isinstance(layer, BaseTunerLayer | AuxiliaryTrainingWrapper)
        for part in layer.adapter_layer_names
    )


def _unknown(name: object) -> str:
    from peft import LoraConfig

    expected = f"`lora` expected to hold arguments of `peft.LoraConfig` but got {name!r}."
    if name == "task_type":
        return f"{expected} It is always 'CAUSAL_LM' here: leave it out."
    if name in LoraConfig.__dataclass_fields__:
        return (
            f"{expected} That one is not supported here: make the model with `peft.get_peft_model` yourself, and pass"
            " it as `source`."
        )
    return f"{expected} {closest(str(name), LORA_ARGUMENTS, count=1)}"
