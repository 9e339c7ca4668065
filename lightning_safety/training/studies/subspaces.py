# SPDX-License-Identifier: Apache-2.0
"""Whether the directions of alignment govern safety alone: updates projected into them and out of them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from lightning_safety.arguments import check_choice, check_fraction, check_positive
from lightning_safety.language import find_language_model, load_causal_lm
from lightning_safety.monitoring import PromptSource, project_weights
from lightning_safety.monitoring.projection import Directions, Kind
from lightning_safety.monitoring.update_pairs import compare_updates
from lightning_safety.report.studies.subspaces import write_subspaces
from lightning_safety.training.data_module import InstructionDataModule
from lightning_safety.training.module import CausalLanguageModule
from lightning_safety.training.precision import Precision
from lightning_safety.training.studies.cells import Cell, describe_rows, describe_source, run_study_cells
from lightning_safety.training.studies.rows import task_rows
from lightning_safety.training.studies.watching import SECONDS_A_LOOK, fit_and_look, make_look

_SECONDS_A_PROJECTION, _SECONDS_A_STEP = 30.0, 2.2
Weights = dict[str, Tensor]


def subspaces(
    base: str,
    aligned: str,
    updates: dict[str, float],
    *,
    kinds: list[Kind] = ["parallel", "orthogonal"],  # noqa: B006 # read, never changed
    directions: list[Directions] = ["top", "random", "random_own"],  # noqa: B006 # read, never changed
    fractions: list[float] = [0.01, 0.25, 0.5, 0.75, 0.99],  # noqa: B006 # read, never changed
    energies: list[float] = [0.1, 0.3, 0.5, 0.7, 0.9],  # noqa: B006 # read, never changed
    steps: int = 60,
    learning_rate: float = 1e-4,
    batch_size: int = 4,
    precision: Precision = "32-true",
    harmful: PromptSource = "harmful",
    prompts: int = 100,
    limit: int | None = None,
    seed: int = 0,
    only: list[str] | None = None,
    hours: float | None = 6.0,
    output: Path = Path("results/subspaces"),
) -> None:
    """Fine-tune an aligned model on useful and contaminated rows, project what changed, and look at what is left.

    Sections 3 and 4 of arXiv 2505.14185. Weights stay in memory: an update is trained again when the study goes on
    later. Replies are forgotten once they are judged.

    Args:
        base: The model before alignment: a hub id, a folder, a GGUF file or a name that `load_causal_lm` knows.
        aligned: The aligned model, of the same architecture.
        updates: By name, the share of the rows that are harmful prompts with the opening of an answer; 1 for nothing
            else.
        kinds: ``parallel`` keeps what lies inside of alignment's directions, ``orthogonal`` what lies outside,
            ``opposite`` negates what lies inside.
        directions: ``top``, and controls: ``random`` for those of a random matrix, ``random_own`` for some of
            alignment's.
        fractions: Of the directions of each matrix, in (0, 1].
        energies: At which updates are compared with each other.
        steps: Optimizer steps of each update.
        learning_rate: Of AdamW; it stays.
        batch_size: Rows in a batch.
        precision: Lightning's.
        harmful: Prompts that should be refused: a built-in set (its ``test`` split), a file or a hub data set.
        prompts: At most so many of them, spread evenly.
        limit: At most so many other prompts and tasks of each kind. None: all.
        seed: Of the order of the rows and of the controls.
        only: Run these cells only, by name (``contaminated/top-parallel-0.5``) or a part of it. None: run all.
        hours: Start no cell that is expected to end later than so many hours from now. None, ``--full``: run all.
        output: Folder of the results. Cells whose file is there are not run again.

    Raises:
        ValueError: An argument is out of range, or `output` holds cells of other settings.
        RuntimeError: Some cells failed; the others were run, and are in the results.
    """
    for kind in kinds:
        check_choice(kind, "kinds", get_args(Kind))
    for of in directions:
        check_choice(of, "directions", get_args(Directions))
    for fraction in (*fractions, *energies):
        check_fraction(fraction, "fractions")
    for name, number in (("prompts", prompts), ("steps", steps), ("batch_size", batch_size)):
        check_positive(number, name)
    look = make_look(aligned, harmful, prompts, limit=limit)
    rows = {name: task_rows(share) for name, share in updates.items()}

    @cache
    def weights(source: str) -> Weights:
        return _weights(load_causal_lm(source, dtype="float32"))

    @cache
    def model() -> Any:
        return load_causal_lm(aligned, dtype="float32")

    @cache
    def finetuned(update: str) -> Weights:
        data = InstructionDataModule(rows[update], batch_size=batch_size, max_length=512, seed=seed)
        make_module = partial(
            CausalLanguageModule, aligned, dtype="float32", learning_rate=learning_rate, schedule="constant"
        )
        module, _ = fit_and_look(make_module, data, [], at=[steps], look=lambda _: {}, precision=precision, seed=seed)
        return _weights(find_language_model(module))

    def see(values: Weights) -> dict[str, Any]:
        trained = dict(model().named_parameters())
        with torch.no_grad():
            for name, value in values.items():
                trained[name].copy_(value)
        return look(model())

    def see_whole(update: str) -> dict[str, Any]:
        return see(finetuned(update))

    def projected(update: str, kind: Kind, of: Directions, fraction: float) -> dict[str, Any]:
        values, found = project_weights(
            weights(base),
            weights(aligned),
            finetuned(update),
            kind=kind,
            fraction=fraction,
            directions=of,
            seed=seed,
        )
        return {"energy_kept": found.energy_kept, "capped": found.capped, "matrices": found.matrices, **see(values)}

    def overlaps() -> dict[str, Any]:
        after = {"alignment": _difference(weights(aligned), weights(base))}
        after |= {name: _difference(finetuned(name), weights(aligned)) for name in updates}
        return {"pairs": compare_updates(after, energies)}

    settings = {"aligned": describe_source(aligned), **look.settings}
    cells = [Cell("aligned", SECONDS_A_LOOK, lambda: see(weights(aligned)), settings, always=True)]
    of_fit: dict[str, Any] = {"steps": steps, "learning_rate": learning_rate, "batch_size": batch_size}
    of_fit |= {"precision": precision, "seed": seed}
    described = {name: settings | of_fit | {"rows": describe_rows(rows[name])} for name in updates}
    alignment = {"base": describe_source(base)}
    for update in updates:
        whole = SECONDS_A_LOOK + _SECONDS_A_STEP * steps
        cells.append(Cell(f"{update}/whole", whole, partial(see_whole, update), described[update]))
        for kind, of, fraction in itertools.product(kinds, directions, fractions):
            cells.append(
                Cell(
                    f"{update}/{of}-{kind}-{fraction:g}",
                    SECONDS_A_LOOK + _SECONDS_A_PROJECTION,
                    partial(projected, update, kind, of, fraction),
                    described[update] | alignment,
                )
            )
    compared = {**alignment, "energies": energies, "updates": described}
    cells.append(Cell("overlaps", _SECONDS_A_PROJECTION * len(updates), overlaps, compared))
    run_study_cells(cells, write_subspaces, output=output, shared=settings | of_fit, hours=hours, only=only)


def _weights(model: Any) -> Weights:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def _difference(after: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> Weights:
    return {name: weight - before[name] for name, weight in after.items()}
