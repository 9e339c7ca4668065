# SPDX-License-Identifier: Apache-2.0
"""Whether training the weights of highest score makes a model safe better than training others does."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from lightning_safety.arguments import check_choice, check_positive
from lightning_safety.callbacks.selected import SelectedWeightsCallback
from lightning_safety.language import load_causal_lm
from lightning_safety.monitoring import PromptSource
from lightning_safety.report.studies.enhancement import write_enhancement
from lightning_safety.training.data_module import InstructionDataModule
from lightning_safety.training.module import CausalLanguageModule
from lightning_safety.training.precision import Precision
from lightning_safety.training.sources import read_sources
from lightning_safety.training.studies.cells import (
    Cell,
    describe_rows,
    describe_settings,
    describe_source,
    run_study_cells,
)
from lightning_safety.training.studies.watching import (
    SECONDS_A_LOOK,
    Look,
    check_arms,
    fit_and_look,
    make_look,
)

_SECONDS_BESIDE, _SECONDS_A_STEP = 90.0, 4.0


@dataclass
class EnhancementArm:
    """One way to make a model safe.

    Attributes:
        callbacks: What the trainer gets: which weights train. None: all.
        data: Which of the study's mixtures it is trained on.
        learning_rate: What the study's learning rate is multiplied by.
    """

    callbacks: list[pl.Callback] = field(default_factory=list)
    data: str = "retained"
    learning_rate: float = 1.0


def enhance(
    source: str,
    arms: dict[str, EnhancementArm],
    data: dict[str, list[dict[str, Any]]],
    *,
    harmful: PromptSource = "harmful",
    prompts: int = 100,
    limit: int | None = None,
    at: list[int] = [25, 50, 100],  # noqa: B006 # read, never changed
    learning_rate: float = 1.5e-3,
    batch_size: int = 16,
    precision: Precision = "32-true",
    seeds: list[int] = [0, 1, 2],  # noqa: B006 # read, never changed
    only: list[str] | None = None,
    hours: float | None = 6.0,
    output: Path = Path("results/enhance"),
) -> None:
    """Teach a model to refuse in every cell (arm, seed), look at it on the way, and draw the front.

    SET of arXiv 2604.08297 with its controls. The learning rate falls as a cosine to the last step, so an earlier look
    is that of a fit under way. Weights stay in memory, and replies are forgotten once they are judged.

    Args:
        source: The model to begin with: a hub id, a folder, a GGUF file or a name that `load_causal_lm` knows.
        arms: What to compare, by name; those with "random" in it are drawn as controls.
        data: Mixtures that `InstructionDataModule` trains on, by name.
        harmful: Prompts that should be refused: a built-in set (its ``test`` split), a file or a hub data set.
        prompts: At most so many of them, spread evenly.
        limit: At most so many other prompts and tasks of each kind. None: all.
        at: After which optimizer steps to look; the last ends the fit.
        learning_rate: The highest, of AdamW.
        batch_size: Rows in a batch.
        precision: Lightning's.
        seeds: Of the order of the rows and, added to its callback's, of a random mask; one cell each.
        only: Run these cells only, by arm or seed (``seed-0``). None: run all.
        hours: Start no cell that is expected to end later than so many hours from now. None, ``--full``: run all.
        output: Folder of the results. Cells whose file is there are not run again.

    Raises:
        ValueError: An argument is out of range, or `output` holds cells of other settings.
        RuntimeError: Some cells failed; the others were run, and are in the results.
    """
    check_arms({name: arm.callbacks for name, arm in arms.items()}, at)
    for arm in arms.values():
        check_choice(arm.data, "data", list(data))
    check_positive(batch_size, "batch_size")
    check_positive(prompts, "prompts")
    look = make_look(source, harmful, prompts, limit=limit)
    seen = {"source": describe_source(source), **look.settings}
    estimate = _SECONDS_BESIDE + SECONDS_A_LOOK * len(at) + _SECONDS_A_STEP * max(at)

    def before() -> dict[str, Any]:
        return {"looks": [{"step": 0, **look(load_causal_lm(source, dtype="float32"))}]}

    shared = {**seen, "at": at, "batch_size": batch_size, "precision": precision}
    sources = {name: read_sources([dict(row) for row in mixture], "train") for name, mixture in data.items()}
    rows = {name: [f"{one.name}: {describe_rows(one.examples)}" for one in of] for name, of in sources.items()}
    cells = [Cell("before", SECONDS_A_LOOK, before, seen, always=True)]
    for seed in seeds:
        for name, arm in arms.items():
            options: dict[str, Any] = {
                "at": at,
                "learning_rate": arm.learning_rate * learning_rate,
                "batch_size": batch_size,
                "precision": precision,
                "seed": seed,
            }
            described = {"callbacks": describe_settings(arm.callbacks), "data": data[arm.data], "rows": rows[arm.data]}
            run = partial(_fit, source, _drawn_anew(arm.callbacks, seed), data[arm.data], look=look, **options)
            cells.append(Cell(f"seed-{seed}/{name}", estimate, run, seen | options | described))
    run_study_cells(cells, write_enhancement, output=output, shared=shared, hours=hours, only=only)


def _drawn_anew(callbacks: list[pl.Callback], seed: int) -> list[pl.Callback]:
    """Return copies whose random weights are others for every seed of the study."""
    copies = copy.deepcopy(callbacks)
    for callback in copies:
        if isinstance(callback, SelectedWeightsCallback):
            callback.choice.seed += seed
    return copies


def _fit(
    source: str,
    callbacks: list[pl.Callback],
    rows: list[dict[str, Any]],
    *,
    look: Look,
    learning_rate: float,
    batch_size: int,
    **options: Any,
) -> dict[str, Any]:
    make_module = partial(
        CausalLanguageModule,
        source,
        dtype="float32",
        learning_rate=learning_rate,
        betas=(0.9, 0.95),
        schedule="cosine",
        warmup_fraction=0.1,
    )
    rows_of = InstructionDataModule([dict(row) for row in rows], batch_size=batch_size, seed=options["seed"])
    return {"looks": fit_and_look(make_module, rows_of, callbacks, look=look, **options)[1]}
