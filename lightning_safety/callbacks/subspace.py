# SPDX-License-Identifier: Apache-2.0
"""A callback that watches in which directions a fit moves the weights."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn

from lightning_safety.arguments import check_fraction, check_positive
from lightning_safety.callbacks.choice import TwoPrompts
from lightning_safety.callbacks.log import leaves_files
from lightning_safety.callbacks.monitor import Check, SafetyMonitor
from lightning_safety.callbacks.start_file import StartFile, find_start_file, write_start_file
from lightning_safety.callbacks.together import check_no_adapters, check_not_quantized
from lightning_safety.drawing import check_matplotlib, has_matplotlib
from lightning_safety.language import find_language_model, find_tokenizer
from lightning_safety.monitoring.references import (
    alignment_bases,
    check_reference,
    describe_reference,
    gradient_bases,
    saved_bases,
)
from lightning_safety.monitoring.update_overlap import (
    SAFETY,
    UTILITY,
    draw_update_overlap,
    entanglement,
    matrix_shapes,
    measure_update,
)
from lightning_safety.processes import together
from lightning_safety.randomness import preserved_random_state
from lightning_safety.scoring import MixtureLayout, RefusalLikelihood, RefusalMargin, SafetyObjective, scored_weights

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

_CPU_OPERATIONS = 3e10  # operations a second of a decomposition in float64, as measured on two cores
_LONG_CHECK = 60.0  # seconds


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

    Before the first step nothing has moved: overlaps are NaN. By component and by layer, they are in ``safety.jsonl``,
    with the overlap of the two subspaces themselves (``entanglement``); the figure ``subspace_overlap`` shows the
    components. Start weights and subspaces are in ``safety_subspaces.safetensors`` of the run folder, and a resumed fit
    opens that file again or stops. A check changes nothing. ``validate`` and ``test`` have no start to compare with and
    are left alone. One such monitor fits into a trainer. Adapters (LoRA) are refused: under them these weights stand
    still. Under DDP the processes share the matrices, and all must see the run folder.

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
        mixture: Where the experts and routers of a mixture of experts are, if its family is not known.
        batch_size: Examples in one pass of an objective.
        tokenizer: The tokenizer or its path. Default: the module's or the data module's, or the one that lies beside
            the model's weights on disk.
        language_model: The dotted name of the language model in the module, where there are several.
        figures: Whether to draw the figure. None: where matplotlib is installed.
        show_progress: Whether bars show what takes over two seconds at fit start.

    Raises:
        ModuleNotFoundError: `figures` and matplotlib is not installed.
        TypeError: An argument is of the wrong kind.
        ValueError: An argument is out of range. At the start of a fit: a reference does not fit the model, a watched
            weight has an adapter, or a fit is resumed whose file is gone, has changed, or is of other arguments.
    """

    def __init__(
        self,
        every_n_steps: int | None = 200,
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
        mixture: MixtureLayout | None = None,
        batch_size: int = 8,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        language_model: str | None = None,
        figures: bool | None = None,
        show_progress: bool = True,
    ) -> None:
        super().__init__(every_n_steps, every_n_epochs, at_start, at_end)
        check_reference(reference)
        if utility is not None and not isinstance(utility, SafetyObjective):
            raise TypeError(f"`utility` expected to be a SafetyObjective but got {type(utility).__name__}.")
        self.reference = reference
        self.utility = utility
        self.watch_utility = watch_utility
        self.energy = check_fraction(energy, "energy")
        self.include = include
        self.exclude = exclude
        self.mixture = mixture
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
        self._start: StartFile | None = None
        self._entanglement: dict[str, float] = {}
        self._restored: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the monitor's state, and which file the updates are compared with."""
        start = {"file": None, "sha256": ""} if self._start is None else self._start.state
        return {**super().state_dict(), **start}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the run that a checkpoint belongs to."""
        super().load_state_dict(state_dict)
        self._restored = state_dict

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Look for matplotlib, so that a missing one stops the run before it begins."""
        super().setup(trainer, pl_module, stage)
        self._draws = self.figures is not False and has_matplotlib()
        if self.figures:
            check_matplotlib("`figures=True`", "pass `figures=False`")

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the start weights and find the subspaces, or open those of the fit that goes on."""
        # The same trainer may go on without a checkpoint.
        if self._start is not None:
            return
        with together(f"The start of {type(self).__name__}"):
            model = find_language_model(pl_module, self.language_model)
            weights = self._weights(model)
            check_not_quantized(weights, "include")
            check_no_adapters(model, weights, "include")
            if trainer.ckpt_path is None:
                self._start = self._begin_file(trainer, pl_module, model, weights)
            else:
                name, shapes = type(self).__name__, matrix_shapes(weights)
                self._start = find_start_file(
                    trainer, self._restored, self.kinds, shapes, energy=self.energy, monitor=name
                )
            self._entanglement = entanglement(self._start.file) if self.watch_utility else {}

    def _begin_file(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, model: nn.Module, weights: Mapping[str, Tensor]
    ) -> StartFile:
        started = time.perf_counter()
        _warn_of_large(weights)
        with preserved_random_state():
            bases = self._find_subspaces(trainer, pl_module, model, weights)
        metadata = {"reference": describe_reference(self.reference), "energy": str(self.energy), "run": self._run}
        start = write_start_file(trainer, weights, bases, metadata)
        path, count = start.file.path, len(start.file.matrices(SAFETY))
        kinds = f"{metadata['reference']}{' and of everyday answers' if self.watch_utility else ''}"
        rank_zero_info(
            f"{type(self).__name__}: compares {count} matrices with the subspaces of {kinds};"
            f" {path.stat().st_size / 2**20:.0f} MiB in {path.name}; {time.perf_counter() - started:.1f} s."
        )
        return start

    def measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Check | None:
        """Compare the update so far."""
        if self._start is None or trainer.state.fn != "fit":
            return None
        weights = self._weights(find_language_model(pl_module, self.language_model))
        found = measure_update(weights.items(), self._start.file, self.kinds, energy=self.energy, shared=True)
        details: dict[str, Any] = {"components": found.by("component"), "layers": found.by("layer")}
        if self._entanglement:
            details["entanglement"] = self._entanglement
        figures = {"subspace_overlap": partial(draw_update_overlap, found)} if self._draws else {}
        return Check(found.metrics, details, figures=figures)

    def _weights(self, model: nn.Module) -> Mapping[str, nn.Parameter]:
        return scored_weights(model, include=self.include, exclude=self.exclude, mixture=self.mixture)

    def _find_subspaces(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, model: nn.Module, weights: Mapping[str, Tensor]
    ) -> dict[str, dict[str, Tensor]]:
        objectives: dict[str, SafetyObjective] = {}
        bases: dict[str, dict[str, Tensor]] = {}
        if isinstance(self.reference, dict):
            bases[SAFETY] = alignment_bases(
                self.reference["base"],
                self.reference["aligned"],
                list(weights),
                energy=self.energy,
                show_progress=self.show_progress,
                shared=True,
            )
        elif isinstance(self.reference, str):
            bases[SAFETY] = saved_bases(self.reference, SAFETY, matrix_shapes(weights), energy=self.energy)
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
                objective if leaves_files(trainer) else TwoPrompts(objective),
                tokenizer,
                energy=self.energy,
                batch_size=self.batch_size,
                include=self.include,
                exclude=self.exclude,
                mixture=self.mixture,
                show_progress=self.show_progress,
                shared=True,
            )
        return bases


def _warn_of_large(weights: Mapping[str, Tensor]) -> None:
    """Say what a check will take where that is long: decompositions grow with the third power of the size."""
    sizes = [min(shape) for shape in matrix_shapes(weights).values()]
    on_cpu = all(weight.device.type == "cpu" for weight in weights.values())
    seconds = sum(9 * float(size) ** 3 for size in sizes) / _CPU_OPERATIONS
    if on_cpu and seconds > _LONG_CHECK:
        rank_zero_warn(
            f"A check will decompose {len(sizes)} matrices of up to {max(sizes)} rows or columns, about {seconds:.0f} s"
            " on this kind of device. Compare a sample with `include=`, check less often, or train on a GPU."
        )
