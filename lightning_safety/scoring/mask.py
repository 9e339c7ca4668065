# SPDX-License-Identifier: Apache-2.0
"""A set of weights of a model: which entries of which tensors, and where the choice came from."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_safety.arguments import closest
from lightning_safety.language.find import named_weights
from lightning_safety.language.quantized import weight_shape
from lightning_safety.scoring.mask_file import REMAKE, check_mask_file, read_mask_file, write_mask_file
from lightning_safety.scoring.mask_indices import checked_index, checked_shape, contained
from lightning_safety.scoring.unscored import Unscored, common_unscored, read_unscored, write_unscored

if TYPE_CHECKING:
    from lightning_safety.scoring.describe import MaskDescription
    from lightning_safety.scoring.router_load import RouterLoad

STATE_VERSION = 1
_PROBLEMS_SHOWN = 5


@dataclass(frozen=True, eq=False, repr=False)
class SafetyMask:
    """Selected weights of a model, by tensor name.

    Every scored tensor is present, also where none of its entries is selected, so that shares and enrichment are taken
    against all that was scored.

    Args:
        indices: For each scored tensor the flat (row-major) indices of its selected entries, sorted, without
            duplicates. Kept on the CPU as int32, or as int64 for tensors of more than 2³¹ − 1 entries.
        shapes: The shape of each scored tensor, same names. Its order is the tensor order.
        metadata: What the selection was made from: method, fraction, objective, model, seed. Strings only. The
            attribute `unscored` is read from it: by tensor and expert, how many weights were not scored.

    Raises:
        TypeError: An argument or entry is of the wrong type.
        ValueError: Names differ between `indices` and `shapes`, or an index is out of range, unsorted or duplicated, or
            `metadata` counts unscored weights that do not fit the shapes.

    Example:
        >>> mask = SafetyMask({"head": torch.tensor([0, 3])}, {"head": (2, 2)}, {"method": "top"})
        >>> mask
        SafetyMask(2 of 4 weights (50 %) in 1 tensor, method=top)
        >>> other = SafetyMask({"head": torch.tensor([3])}, {"head": (2, 2)})
        >>> (mask - other).indices["head"]
        tensor([0], dtype=torch.int32)
    """

    indices: dict[str, Tensor]
    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str] = field(default_factory=dict)
    unscored: Unscored = field(init=False)

    def __post_init__(self) -> None:
        shapes = {name: checked_shape(name, shape) for name, shape in self.shapes.items()}
        missing = [name for name in shapes if name not in self.indices]
        unknown = [name for name in self.indices if name not in shapes]
        if missing or unknown:
            listed = ", ".join(f"`{name}`" for name in (missing or unknown)[:_PROBLEMS_SHOWN])
            lacking, having = ("indices", "a shape") if missing else ("shape", "indices")
            raise ValueError(
                f"`indices` and `shapes` expected to name the same tensors but {listed} got {having} and no {lacking}."
                " A tensor in which nothing is selected gets an empty index tensor."
            )
        for key, value in self.metadata.items():
            if not isinstance(key, str) or not isinstance(value, str):
                raise TypeError(f"`metadata` expected to map strings to strings but got {key!r}: {value!r}.")
        indices = {name: checked_index(name, self.indices[name], shape) for name, shape in shapes.items()}
        object.__setattr__(self, "shapes", shapes)
        object.__setattr__(self, "indices", indices)
        object.__setattr__(self, "metadata", dict(self.metadata))
        object.__setattr__(self, "unscored", read_unscored(self.metadata, shapes))

    @property
    def count(self) -> int:
        """Number of selected weights."""
        return sum(index.numel() for index in self.indices.values())

    @property
    def scored(self) -> int:
        """Number of weights the selection was made from: all of the tensors' but those that were not scored."""
        return sum(math.prod(shape) for shape in self.shapes.values()) - self.unscored_count

    @property
    def unscored_count(self) -> int:
        """Number of weights that were not scored: of experts that no token reached."""
        return sum(sum(counts.values()) for counts in self.unscored.values())

    @property
    def fraction(self) -> float:
        """Selected weights as a fraction of the scored ones; 0.0 for a mask over nothing."""
        return self.count / self.scored if self.scored else 0.0

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the tensor names and shapes, the same for any two masks over the same scored tensors."""
        listed = json.dumps(sorted((name, list(shape)) for name, shape in self.shapes.items()))
        return hashlib.sha256(listed.encode()).hexdigest()

    @property
    def digest(self) -> str:
        """SHA-256 of what is selected from which tensors: the same for equal masks with tensors in the same order."""
        digest = hashlib.sha256(self.fingerprint.encode())
        for indices in self.indices.values():
            digest.update(indices.numpy().tobytes())
        return digest.hexdigest()

    def __repr__(self) -> str:
        tensors = f"{len(self.shapes)} tensor{'' if len(self.shapes) == 1 else 's'}"
        method = f", method={self.metadata['method']}" if "method" in self.metadata else ""
        share = f"{100 * self.fraction:.3g} %"
        unscored = f", {self.unscored_count:,} unscored" if self.unscored else ""
        return f"SafetyMask({self.count:,} of {self.scored:,} weights ({share}) in {tensors}{unscored}{method})"

    def __eq__(self, other: object) -> bool:
        """Whether both select the same weights from the same tensors; metadata does not count."""
        if not isinstance(other, SafetyMask):
            return NotImplemented
        return self.shapes == other.shapes and all(
            torch.equal(index, other.indices[name]) for name, index in self.indices.items()
        )

    __hash__ = None  # type: ignore[assignment]  # Equal by content, and the content is mutable tensors.

    def __and__(self, other: SafetyMask) -> SafetyMask:
        """Return the weights that both masks select."""
        return self._combined(other, "intersection", lambda left, right: left[contained(left, right)])

    def __or__(self, other: SafetyMask) -> SafetyMask:
        """Return the weights that either mask selects."""
        return self._combined(
            other, "union", lambda left, right: torch.cat([left, right[~contained(right, left)]]).sort().values
        )

    def __sub__(self, other: SafetyMask) -> SafetyMask:
        """Return the weights that this mask selects and the other does not."""
        return self._combined(other, "difference", lambda left, right: left[~contained(left, right)])

    def _combined(self, other: SafetyMask, method: str, operation: Callable[[Tensor, Tensor], Tensor]) -> SafetyMask:
        if not isinstance(other, SafetyMask):
            return NotImplemented
        self._check_same_tensors(other, common_only=False)
        indices = {name: operation(index, other.indices[name]) for name, index in self.indices.items()}
        metadata = {"method": method}
        metadata |= {f"left.{key}": value for key, value in self.metadata.items()}
        metadata |= {f"right.{key}": value for key, value in other.metadata.items()}
        metadata |= write_unscored(common_unscored(self.unscored, other.unscored), self.shapes)
        return SafetyMask(indices, self.shapes, metadata)

    def overlap(self, other: SafetyMask) -> int:
        """Count the weights that both masks select.

        Unlike ``&`` it also takes masks over different sets of tensors: a tensor that one of them lacks adds nothing.

        Raises:
            ValueError: A tensor of both has another shape in each.
        """
        self._check_same_tensors(other, common_only=True)
        shared = [name for name in self.indices if name in other.indices]
        return sum(int(contained(self.indices[name], other.indices[name]).sum()) for name in shared)

    def _check_same_tensors(self, other: SafetyMask, *, common_only: bool) -> None:
        """Refuse masks of different models, or with `common_only` those whose shared tensors differ in shape."""
        names = [*self.shapes, *(name for name in other.shapes if name not in self.shapes)]
        for name in names:
            left, right = self.shapes.get(name), other.shapes.get(name)
            if left == right or (common_only and (left is None or right is None)):
                continue
            raise ValueError(
                f"Masks expected to be over the same tensors but `{name}` is {_shape_text(left)} in one and"
                f" {_shape_text(right)} in the other. Make both from scores of one model with the same"
                " `include` and `exclude`."
            )

    def check_model(self, model: torch.nn.Module) -> None:
        """Make sure that every tensor of the mask is a weight of `model`, of the same shape.

        Raises:
            ValueError: Some are not. The message lists up to five, with the closest names and both shapes.
        """
        weights = named_weights(model)
        problems: list[tuple[str, tuple[int, ...] | None]] = []
        for name, shape in self.shapes.items():
            if name not in weights:
                problems.append((name, None))
            elif weight_shape(weights[name]) != shape:
                problems.append((name, weight_shape(weights[name])))
        if not problems:
            return
        lines = [
            f"- `{name}`: no such weight. {closest(name, weights)}"
            if found is None
            else f"- `{name}`: {_shape_text(self.shapes[name])} in the mask, {_shape_text(found)} in the model."
            for name, found in problems[:_PROBLEMS_SHOWN]
        ]
        if len(problems) > _PROBLEMS_SHOWN:
            lines.append(f"- … and {len(problems) - _PROBLEMS_SHOWN} more.")
        source = f" The mask was made from `{self.metadata['model']}`." if "model" in self.metadata else ""
        raise ValueError(
            f"`mask` expected to fit the model but {len(problems)} of its {len(self.shapes)} tensors do not:\n"
            + "\n".join(lines)
            + f"\nScore this model, or load the one the mask was made from.{source}"
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the mask as one safetensors file: index tensors, and the rest as JSON in the header.

        Raises:
            OSError: The file cannot be written, for instance because the disk is full. An older file stays as it was.
        """
        write_mask_file(path, self.indices, self.shapes, self.metadata, self.fingerprint)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SafetyMask:
        """Read a mask and check all of it: format, version, names, dtypes, bounds, order, duplicates and checksum.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is not a mask, is truncated or altered, or comes from a newer version of the format.
        """
        indices, shapes, metadata, header = read_mask_file(path)
        try:
            mask = cls(indices, shapes, metadata)
        except (TypeError, ValueError) as error:
            raise ValueError(f"`{os.fspath(path)}` is not a valid mask. {error} {REMAKE}") from None
        check_mask_file(path, header, mask.indices, mask.fingerprint)
        return mask

    def state_dict(self) -> dict[str, Any]:
        """Return the mask as tensors and primitives, for a checkpoint read with ``weights_only=True``."""
        return {
            "version": STATE_VERSION,
            "indices": dict(self.indices),
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "metadata": dict(self.metadata),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> SafetyMask:
        """Return the mask that `state_dict` described.

        Raises:
            ValueError: The state has missing keys, comes from another version, or does not describe a valid mask.
        """
        missing = {"version", "indices", "shapes", "metadata"} - set(state)
        if missing or state["version"] != STATE_VERSION:
            found = f"no {sorted(missing)}" if missing else f"version {state['version']!r}"
            raise ValueError(
                f"`state` expected to be version {STATE_VERSION} of a mask's state but got {found}."
                " Load the checkpoint with the version of lightning-safety that wrote it."
            )
        return cls(state["indices"], state["shapes"], state["metadata"])

    def describe(self, router_load: RouterLoad | None = None) -> MaskDescription:
        """Return share and enrichment of the selected weights by component, layer and expert: `describe_mask`."""
        from lightning_safety.scoring.describe import describe_mask

        return describe_mask(self, router_load)


def union_of_masks(masks: Sequence[SafetyMask]) -> SafetyMask:
    """Return what any of the masks selects; unlike ``|``, also of masks over different tensors.

    Example:
        >>> one, other = SafetyMask({"a": torch.tensor([1])}, {"a": (2,)}), SafetyMask({}, {})
        >>> union_of_masks([one, other, one]).count
        1
    """
    shapes = {name: shape for mask in masks for name, shape in mask.shapes.items()}
    indices = {
        name: torch.unique(torch.cat([mask.indices[name] for mask in masks if name in mask.indices])) for name in shapes
    }
    return SafetyMask(indices, shapes, {"method": "union"})


def _shape_text(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else "×".join(map(str, shape)) or "a scalar"
