# SPDX-License-Identifier: Apache-2.0
"""A callback that watches in which directions a fit moves the weights."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl

from lightning_safety.arguments import check_fraction, check_positive
from lightning_safety.callbacks.log import leaves_files, run_folder
from lightning_safety.callbacks.monitor import Check, SafetyMonitor
from lightning_safety.language import find_language_model, find_tokenizer
from lightning_safety.monitoring.references import alignment_bases, gradient_bases, saved_bases
from lightning_safety.monitoring.subspace import as_matrices, random_overlap, subspace_overlap
from lightning_safety.monitoring.subspace_file import SubspaceFile, file_hash
from lightning_safety.monitoring.update_overlap import SAFETY, UTILITY, draw_update_overlap, measure_update
from lightning_safety.randomness import preserved_random_state
from lightning_safety.scoring import RefusalLikelihood, RefusalMargin, SafetyObjective, scored_weights

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

SUBSPACE_FILE = "safety_subspaces.safetensors"
"""Start weights and reference subspaces, in the run folder."""


class SubspaceOverlapMonitor(SafetyMonitor):
    """Compares the update so far, weights now − weights at fit start, with a safety subspace and a utility subspace.

    A subspace is spanned by the leading left singular directions of a reference, matrix by matrix: of the gradient of a
    safety objective at fit start, or of an alignment update. "Safety Subspaces are Not (Linearly) Distinct"
    (arXiv 2505.14185) finds that useful updates lie in such subspaces as much as harmful ones do; the same numbers for
    the gradient of everyday answers show that entanglement on your model. So none of them says that a model became
    unsafe: that takes `HarmfulnessMonitor`. Logged are, all under ``safety/``:

    - ``subspace_overlap``: overlap of the update's own subspace with the safety subspace, mean over matrices;
    - ``energy_kept``: the share of the update's energy inside of the safety subspace;
    - ``subspace_overlap_utility``, ``energy_kept_utility``: the same for the utility subspace;
    - each with ``_random`` behind it: what random subspaces of the same ranks give on average;
    - ``update_norm``: Frobenius norm of the update; ``check_seconds``.

    Before the first step nothing has moved: overlaps are NaN. By component and by layer, they are in ``safety.jsonl``;
    the figure ``subspace_overlap`` shows the components. Start weights and subspaces are in ``safety_subspaces.
    safetensors`` of the run folder, and a resumed fit opens that file again or stops. A check changes nothing.

    Args:
        every_n_steps: Check every so many optimizer steps. None: not by steps.
        every_n_epochs: Check at the end of every so many epochs. None: not by epochs.
        at_start: Whether to check before the first step, where every overlap is NaN.
        at_end: Whether to check after the last step.
        reference: The safety subspace. An objective: of its gradient at fit start. A mapping of ``base`` and
            ``aligned`` to checkpoints: of aligned − base. A path: of the run that wrote this file. None: of the
            gradient of `RefusalMargin`.
        utility: The objective whose gradient gives the utility subspace. None: the likelihood of the written answers to
            the built-in everyday prompts.
        watch_utility: Whether there is a utility subspace at all.
        energy: Share of energy that each subspace keeps, in (0, 1].
        include: Only weights whose names match one of these shell-style patterns. With a sample of the matrices, checks
            and file cost less.
        exclude: Leave out those whose names match one of these.
        batch_size: Examples in one pass of an objective.
        tokenizer: The tokenizer or its path. Default: the module's or the data module's, or the one that lies beside
            the model's weights on disk.
        language_model: The dotted name of the language model in the module, where there are several.
        figures: Whether to draw the figure, which takes matplotlib.
        show_progress: Whether bars show what takes over two seconds at fit start.

    Raises:
        ModuleNotFoundError: `figures` and matplotlib is not installed.
        TypeError: An argument is of the wrong kind.
        ValueError: An argument is out of range. At the start of a fit: a reference does not fit the model, or a fit is
            resumed whose file is gone or has changed.
    """

    def __init__(
        self,
        every_n_steps: int | None = 100,
        every_n_epochs: int | None = None,
        *,
        at_start: bool = False,
        at_end: bool = True,
        reference: SafetyObjective | dict[str, str] | str | None = None,
        utility: SafetyObjective | None = None,
        watch_utility: bool = True,
        energy: float = 0.5,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        batch_size: int = 8,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        language_model: str | None = None,
        figures: bool = True,
        show_progress: bool = True,
    ) -> None:
        super().__init__(every_n_steps, every_n_epochs, at_start, at_end)
        _check_reference(reference)
        if utility is not None and not isinstance(utility, SafetyObjective):
            raise TypeError(f"`utility` expected to be a SafetyObjective but got {type(utility).__name__}.")
        self.reference = reference
        self.utility = utility
        self.watch_utility = watch_utility
        self.energy = check_fraction(energy, "energy")
        self.include = include
        self.exclude = exclude
        self.batch_size = check_positive(batch_size, "batch_size")
        self.tokenizer = tokenizer
        self.language_model = language_model
        self.figures = figures
        self.show_progress = show_progress

    @property
    def kinds(self) -> list[str]:
        """The kinds of subspaces."""
        return [SAFETY, UTILITY] if self.watch_utility else [SAFETY]

    def _begin_run(self) -> None:
        super()._begin_run()
        self._file: SubspaceFile | None = None
        self._hash = ""
        self._restored: dict[str, Any] | None = None
        self._temporary: tempfile.TemporaryDirectory[str] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the monitor's state, and which file the updates are compared with."""
        path = None if self._file is None or self._temporary is not None else str(self._file.path.absolute())
        return {**super().state_dict(), "file": path, "sha256": self._hash}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the run that a checkpoint belongs to."""
        super().load_state_dict(state_dict)
        self._restored = state_dict

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Look for matplotlib, so that a missing one stops the run before it begins."""
        super().setup(trainer, pl_module, stage)
        if self.figures and importlib.util.find_spec("matplotlib") is None:
            raise ModuleNotFoundError(
                "`figures` needs matplotlib, which is not installed. Install it with "
                "`pip install 'lightning-safety[report]'`, or pass `figures=False`."
            )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the start weights and find the subspaces, or open those of the resumed fit."""
        if trainer.ckpt_path is not None:
            self._file = self._reopen()
            return
        model = find_language_model(pl_module, self.language_model)
        with preserved_random_state():
            start, bases = self._find_subspaces(trainer, pl_module, model)
        if leaves_files(trainer):
            path = run_folder(trainer) / SUBSPACE_FILE
        else:
            self._temporary = tempfile.TemporaryDirectory()
            path = Path(self._temporary.name) / SUBSPACE_FILE
        metadata = {"reference": _describe(self.reference), "energy": str(self.energy), "run": self._run}
        if trainer.is_global_zero:
            SubspaceFile.write(path, start, bases, metadata)
        self._file, self._hash = SubspaceFile(path), file_hash(path)

    def measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Check:  # noqa: ARG002
        """Compare the update so far."""
        if self._file is None:
            raise ValueError(
                f"{type(self).__name__} expected to check during a fit, whose start it compares with, but"
                " `validate` and `test` have none. Leave it out there."
            )
        weights = self._weights(find_language_model(pl_module, self.language_model))
        found = measure_update(weights.items(), self._file, self.kinds, energy=self.energy)
        details: dict[str, Any] = {"components": found.by("component"), "layers": found.by("layer")}
        if self.watch_utility:
            details["entanglement"] = _entanglement(self._file)
        figures = {"subspace_overlap": partial(draw_update_overlap, found)} if self.figures else {}
        return Check(found.metrics, details, figures=figures)

    def _weights(self, model: nn.Module) -> Mapping[str, Tensor]:
        return scored_weights(model, include=self.include, exclude=self.exclude)

    def _find_subspaces(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, model: nn.Module
    ) -> tuple[Mapping[str, Tensor], dict[str, dict[str, Tensor]]]:
        weights = self._weights(model)
        objectives: dict[str, SafetyObjective] = {}
        bases: dict[str, dict[str, Tensor]] = {}
        if isinstance(self.reference, dict):
            bases[SAFETY] = alignment_bases(
                self.reference["base"],
                self.reference["aligned"],
                list(weights),
                energy=self.energy,
                show_progress=self.show_progress,
            )
        elif isinstance(self.reference, str):
            matrices = (matrix for name, weight in weights.items() for matrix in as_matrices(name, weight).items())
            bases[SAFETY] = saved_bases(self.reference, SAFETY, {name: tuple(one.shape) for name, one in matrices})
        else:
            objectives[SAFETY] = self.reference or RefusalMargin()
        if self.watch_utility:
            objectives[UTILITY] = self.utility or RefusalLikelihood("harmless")
        if objectives:
            datamodule = getattr(trainer, "datamodule", None)
            tokenizer = find_tokenizer(self.tokenizer, module=pl_module, datamodule=datamodule, model=model)
        for kind, objective in objectives.items():
            bases[kind] = gradient_bases(
                model,
                objective,
                tokenizer,
                energy=self.energy,
                batch_size=self.batch_size,
                include=self.include,
                exclude=self.exclude,
                show_progress=self.show_progress,
            )
        return weights, bases

    def _reopen(self) -> SubspaceFile:
        """Open the file of the resumed fit: an update against other start weights would be another number."""
        if self._restored is None or self._restored["file"] is None:
            raise ValueError(
                f"The checkpoint expected to come from a fit with {type(self).__name__} but names no file of start"
                " weights: what it has moved so far cannot be known. Leave the monitor out, or start a new fit."
            )
        self._hash = self._restored["sha256"]
        try:
            return SubspaceFile(self._restored["file"], self._hash)
        except FileNotFoundError as error:
            raise ValueError(
                f"The resumed fit's start weights expected to be in {self._restored['file']!r} but there is no such"
                " file. Put it back, leave the monitor out, or start a new fit."
            ) from error


def _entanglement(file: SubspaceFile) -> dict[str, float]:
    """Return how far safety and utility subspaces themselves overlap, mean over matrices, and by chance."""
    found, chance = [], []
    for matrix in file.matrices(SAFETY):
        safety, utility = file.bases([SAFETY, UTILITY], matrix).values()
        if safety.shape[1] and utility.shape[1]:
            found.append(subspace_overlap(safety, utility))
            chance.append(random_overlap(safety.shape[1], utility.shape[1], len(safety)))
    count = max(1, len(found))
    return {"overlap": sum(found) / count, "overlap_random": sum(chance) / count}


def _check_reference(reference: Any) -> None:
    if isinstance(reference, dict):
        if set(reference) != {"base", "aligned"}:
            raise ValueError(
                f"`reference` expected to name `base` and `aligned` but names {', '.join(map(repr, reference))}. "
                "Pass for instance `reference={'base': 'path/of/base', 'aligned': 'path/of/aligned'}`."
            )
    elif reference is not None and not isinstance(reference, SafetyObjective | str):
        raise TypeError(
            "`reference` expected to be a SafetyObjective, a mapping of `base` and `aligned`, or a path but got "
            f"{type(reference).__name__}."
        )


def _describe(reference: SafetyObjective | dict[str, str] | str | None) -> str:
    if isinstance(reference, dict):
        return f"{reference['aligned']} - {reference['base']}"
    if isinstance(reference, str):
        return os.fspath(reference)
    return ", ".join((reference or RefusalMargin()).describe().values())
