# SPDX-License-Identifier: Apache-2.0
"""Finding the causal language model inside a module, and naming its weights the same whatever wraps it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from lightning_safety.arguments import closest
from lightning_safety.language.quantized import count_weights

_LEADING_WRAPPERS = (("_orig_mod",), ("module",), ("base_model", "model"))
_INNER_WRAPPERS = ("_orig_mod", "base_layer")
_TRAINED_COPIES = "modules_to_save"
_ORIGINAL = ".original_module."
_MODULES_LISTED = 12


def canonical_name(name: str) -> str:
    """Return a parameter name without what torch.compile, DDP and PEFT put into it.

    Removed are leading ``module.`` and ``base_model.model.``, and ``_orig_mod.`` and ``.base_layer`` anywhere, however
    they are nested. A mask made on a bare model thus fits the same model compiled, distributed or under LoRA. The copy
    of a module that PEFT trains whole (``modules_to_save``) has the name of the module; the original, which is not in
    use, keeps ``original_module`` in its name.

    Example:
        >>> canonical_name("module._orig_mod.base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight")
        'model.layers.0.self_attn.q_proj.weight'
        >>> canonical_name("base_model.model.lm_head.modules_to_save.default.weight")
        'lm_head.weight'
        >>> canonical_name("model.base_layers.0.module.weight")
        'model.base_layers.0.module.weight'
    """
    parts = name.split(".")
    stripped = True
    while stripped:
        stripped = False
        for wrapper in _LEADING_WRAPPERS:
            if len(parts) > len(wrapper) and tuple(parts[: len(wrapper)]) == wrapper:
                parts, stripped = parts[len(wrapper) :], True
    # The name of the adapter follows.
    while _TRAINED_COPIES in parts[:-1]:
        start = parts.index(_TRAINED_COPIES)
        parts = parts[:start] + parts[start + 2 :]
    return ".".join(parts[:1] + [part for part in parts[1:] if part not in _INNER_WRAPPERS])


def named_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters by canonical name, in ``named_parameters()`` order; tied ones once.

    Of a module that PEFT trains whole, the trained copy is returned and not the original, which is not in use.

    Raises:
        ValueError: Two parameters have the same canonical name.
    """
    weights: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        canonical = canonical_name(name)
        if canonical in weights:
            raise ValueError(
                f"`model` expected to have one parameter named {canonical!r} but {name!r} is a second one. "
                "Pass the language model itself, as `find_language_model` returns it, and with one adapter that has "
                "`modules_to_save`."
            )
        weights[canonical] = parameter
    unused = {name for name in weights if _ORIGINAL in name and name.replace(_ORIGINAL, ".") in weights}
    return {name: parameter for name, parameter in weights.items() if name not in unused}


def find_language_model(module: nn.Module, name: str | None = None) -> nn.Module:
    """Find the causal language model in a module.

    A causal language model is what has input embeddings and either ``generate`` or an output head, such as any
    ``AutoModelForCausalLM``. It may be the module itself, an attribute or nested deeper; it may be wrapped by
    ``torch.compile``, DDP or PEFT. Of two models of which one contains the other, the outer one is meant.

    Args:
        module: Where to look, for instance a LightningModule.
        name: The dotted name of the model inside `module`, where there are several.

    Returns:
        The model without its wrappers: its parameter names are the bare ones (after `canonical_name`, with LoRA layers
        inside). It shares all weights and hooks with the wrapped one.

    Raises:
        ValueError: There is none, or more than one, or none under `name`; the message lists what was seen. Or the model
            has prompt-learning adapters, which act outside of the base model.

    Example:
        >>> find_language_model(nn.Sequential(nn.Linear(2, 2)))
        Traceback (most recent call last):
        ...
        ValueError: A causal language model (…ForCausalLM) expected in Sequential but found none among: 0 (Linear). \
Assign the model to an attribute of the module.
    """
    root = _unwrap(_descend(module, name) if name else module)
    found = list(_candidates(root, name or "", set()))
    if len(found) == 1:
        return found[0][1]
    place = f"{type(module).__name__}" + (f" at {name!r}" if name else "")
    if not found:
        raise ValueError(
            f"A causal language model (…ForCausalLM) expected in {place} but found none among: {_list_modules(root)}. "
            "Assign the model to an attribute of the module."
        )
    seen = ", ".join(
        f"`{path}` ({type(model).__name__}, {count_weights(model.parameters()):,} weights)" for path, model in found
    )
    raise ValueError(
        f"One causal language model expected in {place} but found {len(found)}: {seen}. "
        f'Say which, for instance `language_model="{found[0][0]}"`.'
    )


def _candidates(module: nn.Module, path: str, seen: set[int]) -> Iterator[tuple[str, nn.Module]]:
    """Yield the outermost language models with their names. The same one under two names comes once."""
    module = _unwrap(module)
    if id(module) in seen:
        return
    seen.add(id(module))
    if _is_language_model(module):
        yield path, module
        return
    for name, child in module.named_children():
        yield from _candidates(child, f"{path}.{name}" if path else name, seen)


def _is_language_model(module: nn.Module) -> bool:
    # A LightningModule that forwards `generate` to its model is the shell around it.
    if hasattr(module, "training_step") or not callable(getattr(module, "get_input_embeddings", None)):
        return False
    head = getattr(module, "get_output_embeddings", None)
    has_head = isinstance(getattr(module, "lm_head", None), nn.Module) or (callable(head) and head() is not None)
    return has_head or callable(getattr(module, "generate", None))


def _unwrap(module: nn.Module) -> nn.Module:
    """Remove torch.compile, DDP and PEFT from the outside of a module, in any nesting."""
    while True:
        inner = _inner(module)
        if inner is None:
            return module
        module = inner


def _inner(module: nn.Module) -> nn.Module | None:
    children = dict(module.named_children())
    if "_orig_mod" in children:
        return children["_orig_mod"]
    # By class: an ordinary module may well have an attribute called `module`.
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return children["module"]
    adapters: Any = getattr(module, "peft_config", None)
    if adapters and "base_model" in children:
        for adapter in adapters.values():
            if getattr(adapter, "is_prompt_learning", False):
                raise ValueError(
                    f"A model whose adapters are inside of its layers (LoRA and its kin) expected but got the "
                    f"prompt-learning adapter {type(adapter).__name__}, which acts outside of the base model."
                )
        tuner = children["base_model"]
        inner = getattr(tuner, "model", None)
        return inner if isinstance(inner, nn.Module) else tuner
    return None


def _descend(module: nn.Module, name: str) -> nn.Module:
    """Follow a dotted name, through wrappers where the name leaves them out."""
    current, walked = module, type(module).__name__
    for part in name.split("."):
        child = getattr(current, part, None)
        if not isinstance(child, nn.Module):
            current = _unwrap(current)
            child = getattr(current, part, None)
        if not isinstance(child, nn.Module):
            names = [child_name for child_name, _ in current.named_children()]
            raise ValueError(
                f"`language_model` expected to be the dotted name of a module but got {name!r}: {walked} has no module "
                f"{part!r}. {closest(part, names)}"
            )
        current, walked = child, f"{walked}.{part}"
    return current


def _list_modules(module: nn.Module) -> str:
    children = [f"{name} ({type(child).__name__})" for name, child in module.named_children()]
    if not children:
        return f"{type(module).__name__} without submodules"
    more = len(children) - _MODULES_LISTED
    return ", ".join(children[:_MODULES_LISTED]) + (f", … ({more} more)" if more > 0 else "")
