# SPDX-License-Identifier: Apache-2.0
"""Weights at the start of a fit, and the subspaces that updates are compared with: one file, read tensor by tensor."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from lightning_safety.arguments import closest
from lightning_safety.files import replace_atomically

_FORMAT = "lightning-safety subspaces 1"
_START = "start"


class SubspaceFile:
    """A file of start weights and of orthonormal bases, by kind (such as ``"safety"``) and matrix.

    Nothing is in memory but what was just read.

    Args:
        path: The file.
        sha256: What its content must hash to; None: anything.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is another kind of file, damaged, or not the one with this hash.
    """

    def __init__(self, path: str | os.PathLike[str], sha256: str | None = None) -> None:
        from safetensors import SafetensorError, safe_open

        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{str(self.path)!r} expected to be a file of subspaces but there is none.")
        if sha256 is not None and file_hash(self.path) != sha256:
            raise ValueError(f"{str(self.path)!r} expected to be the file of this run but it has changed since.")
        try:
            with safe_open(self.path, framework="pt") as handle:
                self.metadata: dict[str, str] = handle.metadata() or {}
                self._keys = set(handle.keys())
        except SafetensorError as error:
            raise ValueError(
                f"{str(self.path)!r} expected to be a whole safetensors file but is not: {error}"
            ) from error
        if self.metadata.get("format") != _FORMAT:
            raise ValueError(
                f"{str(self.path)!r} expected to hold subspaces, as `SubspaceOverlapMonitor` writes them into a run "
                "folder, but is another safetensors file."
            )

    @staticmethod
    def write(
        path: str | os.PathLike[str],
        start: Mapping[str, Tensor],
        bases: Mapping[str, Mapping[str, Tensor]],
        metadata: Mapping[str, str],
    ) -> None:
        """Write a file; a kill at any moment leaves the old one or the new one.

        Args:
            path: The file.
            start: Weights by name.
            bases: By kind and matrix, [rows, rank].
            metadata: What the bases are of.

        Raises:
            OSError: The file cannot be written. An older one stays as it was.
        """
        from safetensors.torch import save_file

        tensors = {f"{_START}/{name}": weight.detach().cpu().contiguous() for name, weight in start.items()}
        for kind, found in bases.items():
            tensors |= {f"{kind}/{name}": basis.float().cpu().contiguous() for name, basis in found.items()}
        with replace_atomically(path) as temporary:
            save_file(tensors, temporary, metadata={"format": _FORMAT, **metadata})

    def matrices(self, kind: str) -> list[str]:
        """Return the names of the matrices that have a basis of this kind."""
        return sorted(key.partition("/")[2] for key in self._keys if key.startswith(f"{kind}/"))

    def check(self, kinds: Sequence[str], shapes: Mapping[str, tuple[int, ...]], *, energy: float) -> None:
        """Make sure that a model can be compared with what is here.

        Args:
            kinds: The kinds of bases that are needed.
            shapes: The shape of each matrix that is compared.
            energy: The share of energy that the bases must keep.

        Raises:
            ValueError: They keep another share, or those of a matrix are missing or of other dimensions.
        """
        kept = float(self.metadata.get("energy", "nan"))
        if kept != energy:
            raise ValueError(
                f"`energy` expected to be that of the subspaces in {str(self.path)!r}, {kept}, but got {energy}. Pass"
                f" `energy={kept}`."
            )
        for kind in kinds:
            there = set(self.matrices(kind))
            for name, shape in shapes.items():
                if name not in there:
                    raise ValueError(
                        f"{str(self.path)!r} expected to hold the {kind} subspaces of every weight that is compared but"
                        f" has none of `{name}`. {closest(name, there)} Compare fewer weights with `include=`, or take"
                        " another file."
                    )
                rows = len(self.bases([kind], name)[kind])
                if rows != shape[0]:
                    raise ValueError(
                        f"{str(self.path)!r} expected to hold subspaces of the model that is trained but those of"
                        f" `{name}` are of {rows} dimensions instead of {shape[0]}."
                    )

    def start(self, name: str) -> Tensor:
        """Return the weight at the start of the fit."""
        return self._read([f"{_START}/{name}"])[0]

    def bases(self, kinds: list[str], matrix: str) -> dict[str, Tensor]:
        """Return the bases of a matrix by kind. float32 [rows, rank]."""
        return dict(zip(kinds, self._read([f"{kind}/{matrix}" for kind in kinds]), strict=True))

    def _read(self, keys: list[str]) -> list[Tensor]:
        from safetensors import safe_open

        with safe_open(self.path, framework="pt") as handle:
            return [handle.get_tensor(key).clone() for key in keys]


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
