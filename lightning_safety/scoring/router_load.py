# SPDX-License-Identifier: Apache-2.0
"""How many tokens the routers of a mixture-of-experts model send to each expert."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_safety.arguments import check_positive, closest
from lightning_safety.language.likelihood import forward_arguments, output_head
from lightning_safety.language.modes import evaluation_mode
from lightning_safety.progress import track
from lightning_safety.randomness import preserved_random_state
from lightning_safety.scoring.families import WEIGHS_ALL, text_config
from lightning_safety.scoring.mixture import Mixture, MixtureLayout, canonical_modules, find_mixture
from lightning_safety.scoring.objective import SafetyObjective

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class RouterLoad:
    """How many tokens each expert got.

    Attributes:
        tokens: How many tokens there were, without padding.
        shares: By the name of the module that holds the experts, then by expert: the share of the tokens that were sent
            to it, in [0, 1]. Over the experts of a module they add up to the number of experts for each token.
    """

    tokens: int
    shares: dict[str, dict[str, float]]

    def check_experts(self, experts: Mapping[str, Sequence[str]]) -> None:
        """Make sure that there is a share for each of these experts, by module.

        Raises:
            ValueError: There is not.
        """
        for module, names in experts.items():
            found = self.shares.get(module)
            if found is None or not set(names) <= set(found):
                has = "none" if found is None else f"{len(found)}"
                raise ValueError(
                    f"`router_load` expected to be of the mask's model but of the {len(names)} experts of `{module}` it"
                    f" has {has}. {closest(module, self.shares)} Measure it on the model that the mask was made from."
                )


def measure_router_load(
    model: nn.Module,
    objective: SafetyObjective,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int = 8,
    mixture: MixtureLayout | None = None,
    show_progress: bool = True,
) -> RouterLoad:
    """Run a model on the examples of an objective and count which experts its routers choose.

    Every token counts once, prompt and response alike; padding does not. The model is left as it was found.

    Args:
        model: A causal language model with experts.
        objective: Whose examples; its batches hold ``input_ids`` and ``attention_mask``.
        tokenizer: The model's tokenizer.
        batch_size: Examples in one pass.
        mixture: Where experts and routers are. Default: by a table of model families.
        show_progress: Whether a bar shows where this takes over two seconds.

    Raises:
        ValueError: The model has no experts, its family is not known, or it does not show which experts are chosen:
            neither the module that holds the experts is given their numbers, nor does a router return them.
    """
    check_positive(batch_size, "batch_size")
    found = find_mixture(model, mixture)
    if not found.experts:
        raise ValueError(
            f"`model` expected to have experts but {type(model).__name__} has none. A dense model has no router."
        )
    counts = {module: torch.zeros(len(names), dtype=torch.int64) for module, names in found.experts.items()}
    device = next(model.parameters()).device
    tokens = 0
    with preserved_random_state(), torch.no_grad(), evaluation_mode(model, use_cache=False):
        objective.prepare(model, tokenizer)
        batches = objective.batches(tokenizer, batch_size=batch_size)
        for batch in track(batches, "Counting tokens by expert", enabled=show_progress):
            tensors = batch.to(device).tensors
            if "input_ids" not in tensors or "attention_mask" not in tensors:
                raise ValueError(
                    "`objective` expected to give batches of `input_ids` and `attention_mask` but they hold"
                    f" {', '.join(tensors)}. Pass one of the objectives of this package."
                )
            real = tensors["attention_mask"].bool()
            with _watched(model, found, real) as chosen:
                model(input_ids=tensors["input_ids"], **forward_arguments(model, tensors["attention_mask"]))
            tokens += int(real.sum())
            for module, count in counts.items():
                if module not in chosen:
                    raise ValueError(
                        f"`model` expected to show which of the experts of `{module}` are chosen but neither is that"
                        " module given their numbers, [tokens, chosen], nor does a router beside it return them. Its"
                        " router load cannot be measured."
                    )
                # A number beyond the experts stands for none of them.
                count += torch.bincount(chosen[module], minlength=len(count))[: len(count)].cpu()
    shares = {
        module: dict(zip(names, (counts[module].double() / tokens).tolist(), strict=True))
        for module, names in found.experts.items()
    }
    return RouterLoad(tokens, shares)


@contextmanager
def _watched(model: nn.Module, mixture: Mixture, real: Tensor) -> Iterator[dict[str, Tensor]]:
    """Yield what a forward pass fills: by module with experts, the numbers chosen for tokens that are `real`."""
    modules = canonical_modules(model)
    weighs_all = getattr(text_config(model), "model_type", "") in WEIGHS_ALL
    given: dict[str, Tensor] = {}
    returned: dict[str, Tensor] = {}

    def keep(found: dict[str, Tensor], name: str, numbers: Tensor | None) -> None:
        if numbers is not None:
            found[name] = torch.cat([found[name], numbers]) if name in found else numbers

    with ExitStack() as hooks:
        for name in mixture.experts:

            def enters(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name) -> None:
                keep(given, name, _numbers([*args, *kwargs.values()], real))

            hooks.callback(modules[name].register_forward_pre_hook(enters, with_kwargs=True).remove)
            for router in _routers_of(name, mixture):

                def leaves(_: nn.Module, inputs: Any, output: Any, name: str = name) -> None:  # noqa: ARG001
                    values = output if isinstance(output, list | tuple) else [output]
                    keep(returned, name, _weighed(values[0], real) if weighs_all else _numbers(values, real))

                hooks.callback(modules[router].register_forward_hook(leaves).remove)
        head = output_head(model)
        if head is not None:
            # No logits are needed.
            hooks.callback(head.register_forward_pre_hook(_last_position).remove)
        chosen: dict[str, Tensor] = {}
        yield chosen
        chosen.update(returned | given)


def _routers_of(module: str, mixture: Mixture) -> list[str]:
    """Return the routers inside of a module with experts, or else beside it."""
    inside = [router for router in mixture.routers if router.startswith(f"{module}.")]
    block = module.rpartition(".")[0]
    return inside or [router for router in mixture.routers if router.rpartition(".")[0] == block]


def _numbers(values: Iterable[Any], real: Tensor) -> Tensor | None:
    """Return the first integers of shape [tokens, chosen] or [batch, length, chosen], of real tokens, flat."""
    for value in values:
        if not isinstance(value, Tensor) or value.dtype not in (torch.int64, torch.int32):
            continue
        leading = value.shape[:-1]
        if leading == real.shape or leading == (real.numel(),):
            return value.reshape(real.numel(), -1)[real.flatten()].flatten().long()
    return None


def _weighed(weights: Tensor, real: Tensor) -> Tensor:
    """Return the numbers of the experts whose weight, [tokens, experts], is not zero."""
    return weights.reshape(real.numel(), -1)[real.flatten()].nonzero()[:, 1]


def _last_position(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (inputs[0][:, -1:], *inputs[1:])
