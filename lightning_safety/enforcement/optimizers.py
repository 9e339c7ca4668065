# SPDX-License-Identifier: Apache-2.0
"""Which optimizers can be followed, and which can train a few entries of a tensor as if they were all there is."""

from __future__ import annotations

from torch import Tensor, nn
from torch.optim import Optimizer

# One word of the class name, lower case, and why such an optimizer treats an entry by more than its own gradient.
_SEVERAL_EVALUATIONS = "evaluates the model several times in a step"
_NOT_ELEMENTWISE = {
    "8bit": "keeps its state in quantised blocks",
    "4bit": "keeps its state in quantised blocks",
    "fp8": "keeps its state in quantised blocks",
    "adafactor": "factors its state over rows and columns",
    "came": "factors its state over rows and columns",
    "sm3": "factors its state over rows and columns",
    "muon": "orthogonalises the update of whole matrices",
    "shampoo": "preconditions whole matrices",
    "soap": "preconditions whole matrices",
    "kfac": "preconditions whole matrices",
    "galore": "projects whole matrices",
    "apollo": "projects whole matrices",
    "adam_mini": "shares its state within blocks",
    "adammini": "shares its state within blocks",
    "lamb": "scales the update by the norm of the whole tensor",
    "lars": "scales the update by the norm of the whole tensor",
    "lbfgs": _SEVERAL_EVALUATIONS,
    "zeroredundancy": "spreads its parameters over processes",
}


def optimized_parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    """Return the parameters that an optimizer holds, of all groups."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def evaluated_again(name: str) -> RuntimeError:
    """Return the error for an optimizer that changed the weight `name`, and evaluates the model in the same step."""
    return RuntimeError(
        "The optimizer expected to evaluate the model once in a step but it did so again after changing the"
        f" weights (`{name}`). Use one that takes a gradient and makes a step, such as AdamW."
    )


def check_reports_steps(optimizer: Optimizer) -> None:
    """Refuse an optimizer whose steps no hook reports.

    Raises:
        TypeError: It is not a torch optimizer, or it does not call torch's initialisation, which sets up the hooks.
    """
    reports = isinstance(optimizer, Optimizer) and getattr(type(optimizer).step, "hooked", False)
    if not reports:
        raise TypeError(
            f"`optimizer` expected to be a `torch.optim.Optimizer` that reports its steps but got"
            f" {type(optimizer).__module__}.{type(optimizer).__qualname__}. Held weights could not be put back after"
            " its steps: derive it from `torch.optim.Optimizer` and call `super().__init__`."
        )


def check_elementwise(optimizer: Optimizer) -> None:
    """Refuse an optimizer known to treat an entry by more than that entry's own value and gradient.

    Unknown optimizers pass; `check_state_is_elementwise` looks at what they keep once they have made a step.

    Raises:
        ValueError: The optimizer is one of those.
    """
    name = type(optimizer).__name__
    reason = next((reason for word, reason in _NOT_ELEMENTWISE.items() if word in name.lower()), None)
    if name.lower() == "sam":
        reason = _SEVERAL_EVALUATIONS
    # bitsandbytes spells its 8-bit optimizers AdamW8bit and AdamW(optim_bits=8).
    if getattr(getattr(optimizer, "args", None), "optim_bits", 32) != 32:
        reason = _NOT_ELEMENTWISE["8bit"]
    if reason is not None:
        raise ValueError(
            f"`optimizer` expected to treat every weight by its own gradient but {name} {reason}, so training a few"
            " weights of a tensor would not be what it does on the whole tensor. Use AdamW, SGD or Lion, for instance"
            " `torch.optim.AdamW`; its state covers the selected weights only and is small."
        )


def check_state_is_elementwise(optimizer: Optimizer, parameter: Tensor) -> None:
    """Refuse an optimizer that keeps something else than one value per weight, or one value for all of them.

    Raises:
        RuntimeError: A state tensor of `parameter` has another number of entries.
    """
    for key, value in optimizer.state.get(parameter, {}).items():
        if isinstance(value, Tensor) and value.numel() > 1 and value.numel() != parameter.numel():
            raise RuntimeError(
                f"`optimizer` expected to keep one value per weight but {type(optimizer).__name__} keeps"
                f" {value.numel()} in `{key}` for {parameter.numel()} weights. Use AdamW, SGD or Lion."
            )


def trains(optimizer: Optimizer, model: nn.Module, module: nn.Module) -> bool:
    """Return whether an optimizer trains weights of a model, or something in their place that no module has.

    Args:
        optimizer: The optimizer.
        model: A part of `module`, or all of it.
        module: What all optimizers train.
    """
    of_model = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    of_module = {id(parameter) for parameter in module.parameters()}
    return any(
        id(parameter) in of_model or id(parameter) not in of_module for parameter in optimized_parameters(optimizer)
    )
