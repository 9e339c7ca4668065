# SPDX-License-Identifier: Apache-2.0
"""The result of training selected weights, as a small file that turns one model into the other and back."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_safety.enforcement.entries import (
    count_different_bits,
    gather_entries,
    scatter_entries,
    selected_parameters,
    snapshot_entries,
)
from lightning_safety.enforcement.patch_file import read_patch_file, write_patch_file
from lightning_safety.scoring.mask import SafetyMask

_NAMES_SHOWN = 5
_CLOSE = 0.2  # relative distance: above that of 4-bit quantisation, far below that of two models


@dataclass(frozen=True, eq=False, repr=False)
class SafetyPatch:
    """The weights that a training changed, their values before and after, in the weights' own dtype.

    Args:
        mask: Which weights.
        before: For each tensor with selected entries their values before, 1-D in the order of the indices.
        after: The same after.
        metadata: What the patch was made by. Strings only.

    Raises:
        ValueError: Names, sizes or dtypes of `mask`, `before` and `after` do not agree.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> mask = SafetyMask({"weight": torch.tensor([1])}, {"weight": (1, 2)})
        >>> patch = SafetyPatch(mask, {"weight": model.weight.detach()[0, 1:]}, {"weight": torch.tensor([0.5])})
        >>> patch.apply(model)
        >>> model.weight[0, 1].item()
        0.5
        >>> patch.apply(model)
        Traceback (most recent call last):
        ...
        ValueError: `model` expected to hold the values from before the patch but the patch is already applied. ...
    """

    mask: SafetyMask
    before: dict[str, Tensor]
    after: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        selected = {name: index for name, index in self.mask.indices.items() if index.numel()}
        for side in ("before", "after"):
            values = getattr(self, side)
            _check_values(side, values, selected)
            # Copies: a view of the model's weights would change with them.
            object.__setattr__(self, side, {name: values[name].detach().cpu().clone() for name in selected})
        for name in selected:
            if self.before[name].dtype != self.after[name].dtype:
                raise ValueError(
                    f"`before` and `after` expected to have one dtype but `{name}` is {self.before[name].dtype} before"
                    f" and {self.after[name].dtype} after. Take both from the same model."
                )
        # Tensors that were scored and not selected say nothing in a patch.
        shapes = {name: self.mask.shapes[name] for name in selected}
        object.__setattr__(self, "mask", SafetyMask(selected, shapes, self.mask.metadata))
        object.__setattr__(self, "metadata", dict(self.metadata))

    @classmethod
    def capture(
        cls,
        model: torch.nn.Module,
        mask: SafetyMask,
        before: Mapping[str, Tensor],
        metadata: Mapping[str, str] | None = None,
    ) -> SafetyPatch:
        """Return the patch from the values `before` to those that `model` holds now.

        Of a model that FSDP2 shards, every process must call this.

        Args:
            model: The trained model, or a wrapper of it.
            mask: The weights that were trained.
            before: What `snapshot_entries(model, mask)` returned before the training.
            metadata: Strings to keep with the patch.

        Raises:
            ValueError: The mask does not fit the model, or `before` does not fit the mask.
        """
        return cls(mask, dict(before), snapshot_entries(model, mask), dict(metadata or {}))

    @property
    def count(self) -> int:
        """Number of weights the patch covers."""
        return self.mask.count

    @property
    def changed(self) -> int:
        """Number of weights whose value before and after differ."""
        return sum(count_different_bits(self.before[name], self.after[name]) for name in self.before)

    def apply(self, model: torch.nn.Module) -> None:
        """Turn the values before into those after, in place.

        Raises:
            ValueError: The patch does not fit the model, or not every place holds the value from before. The message
                says how many do not, and the likely cause. Nothing is changed.
        """
        self._replace(model, self.before, self.after, "before", "already applied")

    def revert(self, model: torch.nn.Module) -> None:
        """Turn the values after into those before, in place.

        Raises:
            ValueError: The patch does not fit the model, or not every place holds the value from after. The message
                says how many do not, and the likely cause. Nothing is changed.
        """
        self._replace(model, self.after, self.before, "after", "not applied")

    def info(self) -> str:
        """Return what the patch covers and where it comes from, one line each."""
        dtypes = sorted({str(value.dtype).removeprefix("torch.") for value in self.before.values()})
        lines = {
            "weights": f"{self.count:,} in {len(self.before)} tensors",
            "changed": f"{self.changed:,}",
            "dtype": ", ".join(dtypes),
            **self.metadata,
            **{f"mask.{key}": value for key, value in self.mask.metadata.items()},
        }
        width = max(map(len, lines))
        return "\n".join(f"{key:<{width}}  {value}" for key, value in lines.items())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the patch as one safetensors file.

        Raises:
            OSError: The file cannot be written, for instance because the disk is full. An older file stays as it was.
        """
        write_patch_file(path, self.mask, self.before, self.after, self.metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SafetyPatch:
        """Read a patch and check all of it: format, version, names, dtypes, sizes, bounds, order and checksum.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is not a patch, is truncated or altered, or comes from a newer version of the format.
        """
        return read_patch_file(path, cls)

    def __repr__(self) -> str:
        return f"SafetyPatch({self.count:,} weights in {len(self.before)} tensors, {self.changed:,} changed)"

    def _replace(
        self, model: torch.nn.Module, old: dict[str, Tensor], new: dict[str, Tensor], side: str, done: str
    ) -> None:
        """Write `new` where `old` stands, after every tensor has been found to hold `old`."""
        selected = selected_parameters(model, self.mask)
        _check_dtypes({name: (parameter.dtype, old[name].dtype) for name, parameter, _ in selected})
        present = {name: gather_entries(parameter, indices).cpu() for name, parameter, indices in selected}
        wrong = {name: count_different_bits(present[name], old[name]) for name in present}
        if any(wrong.values()):
            replaced = all(count_different_bits(present[name], new[name]) == 0 for name in present)
            distance = _relative_distance(present, old)
            raise ValueError(_mismatch(wrong, self.count, distance, side, done if replaced else None))
        for name, parameter, indices in selected:
            scatter_entries(parameter, indices, new[name].to(parameter.device))


def _check_values(side: str, values: Mapping[str, object], selected: Mapping[str, Tensor]) -> None:
    """Refuse values that are not one floating-point number per selected weight."""
    for name in (*selected, *values):
        if name not in values or name not in selected:
            lacks = "values" if name in selected else "selected weights"
            raise ValueError(f"`{side}` expected to hold values of what `mask` selects but `{name}` has no {lacks}.")
        value, count = values[name], selected[name].numel()
        if not isinstance(value, Tensor) or not value.is_floating_point() or tuple(value.shape) != (count,):
            found = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"`{side}` expected to hold {count} floating-point values for `{name}` but got {found}.")


def _check_dtypes(dtypes: Mapping[str, tuple[torch.dtype, torch.dtype]]) -> None:
    """Refuse a model whose weights have another dtype than the patch: their bits could not agree."""
    wrong = {name: pair for name, pair in dtypes.items() if pair[0] != pair[1]}
    if wrong:
        name, (found, expected) = next(iter(wrong.items()))
        raise ValueError(
            f"`model` expected to hold the dtypes of the patch but {len(wrong)} of {len(dtypes)} tensors do not:"
            f" `{name}` is {found} in the model and {expected} in the patch. Load the model with `dtype={expected}`,"
            " apply the patch, and convert afterwards."
        )


def _relative_distance(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Return the norm of the difference relative to the norm of `expected`, over all tensors."""
    difference = sum(float((found[name].double() - expected[name].double()).square().sum()) for name in expected)
    norm = sum(float(expected[name].double().square().sum()) for name in expected)
    return (difference / norm) ** 0.5 if norm else float("inf")


def _mismatch(wrong: Mapping[str, int], count: int, distance: float, side: str, done: str | None) -> str:
    """Return the message for a model that does not hold the `side` values, with the likely cause."""
    expected = f"`model` expected to hold the values from {side} the patch"
    if done == "already applied":
        return f"{expected} but the patch is already applied. Use `revert` to take it back."
    if done == "not applied":
        return f"{expected} but the patch is not applied. Use `apply` first."
    tensors = [name for name, number in wrong.items() if number]
    shown = ", ".join(f"`{name}` ({wrong[name]:,})" for name in tensors[:_NAMES_SHOWN])
    more = f" and {len(tensors) - _NAMES_SHOWN} more" if len(tensors) > _NAMES_SHOWN else ""
    if distance < _CLOSE:
        cause = "They are close: probably the same model, trained further or loaded from another dtype or quantisation"
    else:
        cause = "They are far apart: probably another model"
    return (
        f"{expected} but {sum(wrong.values()):,} of {count:,} places hold others: {shown}{more}. {cause}. Nothing was"
        " changed. Load the very model that the patch was made from."
    )
