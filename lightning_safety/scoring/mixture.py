# SPDX-License-Identifier: Apache-2.0
"""Which modules of a mixture-of-experts model hold experts and which choose among them."""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from lightning_safety.arguments import closest
from lightning_safety.language.find import canonical_name
from lightning_safety.scoring.families import FAMILIES, number_of_experts, text_config

_SEEN_SHOWN = 12


@dataclass(frozen=True)
class MixtureLayout:
    """Where a model keeps its experts and routers, for models whose family is not known.

    Patterns are shell-style and match whole dotted names of modules, as `model.named_modules()` gives them.

    Args:
        experts: Patterns of the modules that hold experts: fused ones as parameters of shape [experts, …, …], others
            as one submodule each. Empty for a model without experts.
        routers: Patterns of the modules that choose among experts, or weigh a shared one. They are never scored.

    Raises:
        TypeError: A pattern is not a string.

    Example:
        >>> MixtureLayout(experts="*.moe.specialists", routers=["*.moe.switch"]).describe()
        {'experts': '["*.moe.specialists"]', 'routers': '["*.moe.switch"]'}
    """

    experts: str | Sequence[str]
    routers: str | Sequence[str]

    def __post_init__(self) -> None:
        for argument, patterns in (("experts", self.experts), ("routers", self.routers)):
            patterns = [patterns] if isinstance(patterns, str) else list(patterns)
            if not all(isinstance(pattern, str) for pattern in patterns):
                raise TypeError(f"`{argument}` expected to be a pattern or a list of patterns but got {patterns!r}.")
            object.__setattr__(self, argument, tuple(patterns))

    def describe(self) -> dict[str, str]:
        """Return the patterns for the metadata of a mask, so that its description finds the experts again."""
        return {"experts": json.dumps(list(self.experts)), "routers": json.dumps(list(self.routers))}


def check_layout(layout: object) -> None:
    """Raise unless this is a layout or None.

    Raises:
        TypeError: It is something else.
    """
    if not isinstance(layout, MixtureLayout | None):
        raise TypeError(
            f"`mixture` expected to be a MixtureLayout but got {type(layout).__name__}. Pass for instance"
            " `MixtureLayout(experts='*.mlp.experts', routers='*.mlp.gate')`."
        )


@dataclass(frozen=True)
class Mixture:
    """The experts and routers of one model; no experts in a dense one.

    Attributes:
        experts: By the canonical name of each module that holds experts, the experts' own names in their order: their
            numbers, where they are fused.
        fused: Those of the modules whose experts are slices of shared parameters.
        routers: Canonical names of routers and gates.
    """

    experts: Mapping[str, tuple[str, ...]]
    fused: frozenset[str]
    routers: frozenset[str]

    def in_router(self, name: str) -> bool:
        """Whether a module is a router or part of one."""
        return any(prefix in self.routers for prefix in prefixes(name))

    def in_fused_experts(self, name: str) -> bool:
        """Whether a module holds fused experts, or is part of one that does."""
        return any(prefix in self.fused for prefix in prefixes(name))


def find_mixture(model: nn.Module, layout: MixtureLayout | None = None) -> Mixture:
    """Return the experts and routers of a model.

    A table of model families says where they are (`FAMILIES`, by ``config.model_type``), and what is found there must
    be built like experts. Names alone decide nothing: where they, or the configuration, suggest experts that the table
    does not know, this stops and asks.

    Args:
        model: A causal language model, bare or wrapped.
        layout: Where they are, instead of what the table says.

    Raises:
        TypeError: `layout` is something else.
        ValueError: The model seems to have experts but its family is not known, a pattern of `layout` matches no
            module, or what matches holds no experts.
    """
    check_layout(layout)
    modules = canonical_modules(model)
    config = text_config(model)
    family = str(getattr(config, "model_type", ""))
    if layout is not None:
        mixture = _read_mixture(modules, layout, given=True)
    elif family in FAMILIES:
        mixture = _read_mixture(modules, MixtureLayout(*FAMILIES[family]), given=False)
    else:
        mixture = Mixture({}, frozenset(), frozenset())
    if layout is None:
        known = {name for name in modules if any(prefix in mixture.experts for prefix in prefixes(name))}
        expected = number_of_experts(config) > 1 and family not in FAMILIES
        # Code from elsewhere may go by the name of a family and be built otherwise.
        routed = {name.rpartition(".")[0] for name in mixture.routers}
        alone = any(name.rpartition(".")[0] not in routed for name in mixture.experts)
        others = any(_looks_like_experts(name, module) for name, module in modules.items() if name not in known)
        if expected or alone or others:
            raise ValueError(_not_known(model, family, modules))
    return mixture


def canonical_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return all modules but adapters by canonical name; the innermost, where a wrapper goes by the same one."""
    named = {canonical_name(path): module for path, module in model.named_modules() if path}
    return {name: module for name, module in named.items() if not in_adapter(name)}


def in_adapter(name: str) -> bool:
    """Whether a module is part of a LoRA adapter."""
    return any(part.startswith("lora_") for part in name.split("."))


def prefixes(name: str) -> Iterator[str]:
    """Yield the names of the modules that something is in, the outermost first, then its own.

    Example:
        >>> list(prefixes("mlp.experts.0"))
        ['mlp', 'mlp.experts', 'mlp.experts.0']
    """
    end = name.find(".")
    while end >= 0:
        yield name[:end]
        end = name.find(".", end + 1)
    yield name


def _read_mixture(modules: Mapping[str, nn.Module], layout: MixtureLayout, *, given: bool) -> Mixture:
    routers = frozenset(_outermost(_matching("routers", layout.routers, modules, given)))
    experts: dict[str, tuple[str, ...]] = {}
    fused = set()
    for name in _outermost(_matching("experts", layout.experts, modules, given)):
        sizes = dict(_fused_sizes(name, modules[name], routers))
        experts[name] = tuple(map(str, range(next(iter(sizes.values()), 0)))) or _children(modules[name])
        if not experts[name] or len(set(sizes.values())) > 1:
            listed = ", ".join(f"`{weight}`: {size}" for weight, size in sizes.items()) or "neither"
            raise ValueError(
                f"`{name}` ({type(modules[name]).__name__}) expected to hold experts, as parameters of shape"
                f" [experts, …, …] or as one submodule each, but has {listed}. Name the modules that do:"
                " `mixture=MixtureLayout(experts=…, routers=…)`."
            )
        if sizes:
            fused.add(name)
    return Mixture(experts, frozenset(fused), routers)


def _fused_sizes(name: str, module: nn.Module, routers: frozenset[str]) -> Iterator[tuple[str, int]]:
    """Yield the first dimension of each parameter in a module that may be fused experts, by name."""
    for path, part in module.named_modules():
        full = canonical_name(f"{name}.{path}" if path else name)
        if not in_adapter(full) and not any(prefix in routers for prefix in prefixes(full)):
            yield from ((f"{full}.{own}", weight.shape[0]) for own, weight in fused_parameters(part))


def fused_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters of a module itself that have three dimensions and are no convolution's."""
    if not isinstance(module, nn.modules.conv._ConvNd):
        yield from ((name, weight) for name, weight in module.named_parameters(recurse=False) if weight.dim() == 3)


def _children(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the submodules that are an expert each."""
    listed = isinstance(module, nn.ModuleList | nn.ModuleDict)
    return tuple(name for name, _ in module.named_children() if listed or name.isdecimal())


def _matching(argument: str, patterns: Iterable[str], modules: Mapping[str, nn.Module], given: bool) -> list[str]:
    matched: list[str] = []
    for pattern in patterns:
        found = [name for name in modules if fnmatch.fnmatchcase(name, pattern)]
        if given and not found:
            raise ValueError(
                f"`mixture` expected {argument} that are modules of the model but {pattern!r} matches none."
                f" {closest(pattern, modules)}"
            )
        matched += found
    return matched


def _outermost(names: Iterable[str]) -> list[str]:
    found = dict.fromkeys(names)
    return [name for name in found if not any(prefix in found for prefix in prefixes(name) if prefix != name)]


def _looks_like_experts(name: str, module: nn.Module) -> bool:
    """Whether a module may hold experts: reason enough to ask, and none to decide."""
    last = name.rpartition(".")[2].lower()
    if last == "experts":
        return True
    holds = isinstance(module, nn.ModuleList | nn.ModuleDict) or any(True for _ in fused_parameters(module))
    return holds and "expert" in f"{last} {type(module).__name__.lower()}" and "shared" not in last


def _not_known(model: nn.Module, family: str, modules: Mapping[str, nn.Module]) -> str:
    words = re.compile(r"expert|rout|gate$|gating|moe(block|layer)?$", re.IGNORECASE)
    seen = {
        re.sub(r"\.\d+(?=\.|$)", ".*", name): type(module).__name__
        for name, module in modules.items()
        if words.search(name.rpartition(".")[2]) or words.search(type(module).__name__)
    }
    listed = ", ".join(f"`{name}` ({kind})" for name, kind in list(seen.items())[:_SEEN_SHOWN]) or "none by such a name"
    return (
        f"`model` expected to be of a family whose experts and routers are known but {type(model).__name__} (model_type"
        f" {family!r}) seems to have experts and is not. Say where they are, for instance"
        " `mixture=MixtureLayout(experts='*.mlp.experts', routers='*.mlp.gate')`, with no patterns if it has none."
        f" Candidates: {listed}. Known families: {', '.join(FAMILIES)}."
    )
