# SPDX-License-Identifier: Apache-2.0
"""What keeps a model's safety while it is tuned on something else, and what that costs: a front, not a point."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import pytorch_lightning as pl

from lightning_safety.arguments import check_choice, check_positive
from lightning_safety.data import Example
from lightning_safety.language import load_causal_lm
from lightning_safety.monitoring import PromptSource
from lightning_safety.report.studies.preservation import write_preservation
from lightning_safety.training.data_module import InstructionDataModule
from lightning_safety.training.module import CausalLanguageModule
from lightning_safety.training.precision import Precision
from lightning_safety.training.studies.cells import (
    Cell,
    describe_rows,
    describe_settings,
    describe_source,
    run_study_cells,
)
from lightning_safety.training.studies.rows import task_rows
from lightning_safety.training.studies.watching import (
    SECONDS_A_LOOK,
    Look,
    check_arms,
    fit_and_look,
    make_look,
)

Training = Literal["full", "lora"]
LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"}
# What a cell takes beside its looks, on two cores: loading the model, and a step.
_SECONDS_BESIDE, _SECONDS_A_STEP = 15.0, 2.2


@dataclass
class Arm:
    """One way to keep a model safe.

    Attributes:
        callbacks: What the trainer gets.
        learning_rate: What the study's learning rate is multiplied by.
        start_share: How much of the start weights is mixed in for the look, in [0, 1). Of all weights: half of each
            factor of an adapter is not half of the adapter.
        training: The kinds of training that the arm is for.

    Raises:
        ValueError: `start_share` is out of range, or beside adapters.
    """

    callbacks: list[pl.Callback] = field(default_factory=list)
    learning_rate: float = 1.0
    start_share: float = 0.0
    training: list[Training] = field(default_factory=lambda: ["full", "lora"])

    def __post_init__(self) -> None:
        if not 0 <= self.start_share < 1:
            raise ValueError(f"`start_share` expected to be in [0, 1) but got {self.start_share}. For half, pass 0.5.")
        if self.start_share and "lora" in self.training:
            raise ValueError(
                f"`start_share={self.start_share}` expected `training` of all weights alone but got {self.training}."
                " Pass `training: [full]`."
            )


def preserve(
    source: str | os.PathLike[str],
    arms: dict[str, Arm],
    *,
    harmful: PromptSource = "harmful",
    prompts: int = 100,
    limit: int | None = None,
    at: list[int] = [120],  # noqa: B006 # read, never changed
    contaminated: list[float] = [0.0, 0.05, 0.2],  # noqa: B006 # read, never changed
    training: list[Training] = ["full", "lora"],  # noqa: B006 # read, never changed
    learning_rate: float = 1e-4,
    lora_learning_rate: float = 2e-4,
    batch_size: int = 4,
    precision: Precision = "32-true",
    seed: int = 0,
    only: list[str] | None = None,
    hours: float | None = 6.0,
    output: Path = Path("results/preserve"),
) -> None:
    """Tune a safe model in every cell (arm, data, training), look at it, and draw the front.

    The task is the built-in `harmless` set: trained on its ``train`` split, perplexity on ``test``. Safety is read by
    two judges from replies to prompts that nothing was tuned on; over-refusal is that on ``borderline/test``. Weights
    stay in memory: no model, checkpoint or patch is written, and replies are forgotten once they are judged.

    Args:
        source: The model to begin with, made safe: a hub id, a folder or a GGUF file.
        arms: What to compare, by name; the one named ``plain`` is what task loss and time are compared with.
        harmful: Prompts that should be refused: a built-in set (its ``test`` split), a file or a hub data set.
        prompts: At most so many of them, spread evenly.
        limit: At most so many other prompts and tasks of each kind. None: all.
        at: After which optimizer steps to look; the last ends the fit.
        contaminated: For each data set the share of its rows that are harmful prompts with the opening of an answer.
        training: Whether all weights train, or LoRA adapters.
        learning_rate: Of AdamW over all weights; it stays.
        lora_learning_rate: Of AdamW over adapters.
        batch_size: Rows in a batch.
        precision: Lightning's.
        seed: Of the order of the rows, and of adapters. Callbacks have seeds of their own.
        only: Run these arms only, and show the results of all. None: run all.
        hours: Start no cell that is expected to end later than so many hours from now. None, ``--full``: run all.
        output: Folder of the results: a JSON file for each cell, ``results.md`` and ``front-….png``. Cells whose file
            is there are not run again.

    Raises:
        ValueError: An argument is out of range, there is no such arm, or `output` holds cells of other settings.
        RuntimeError: Some cells failed; the others were run, and are in the results.
    """
    check_arms({name: arm.callbacks for name, arm in arms.items()}, at)
    for name in only or []:
        check_choice(name, "only", list(arms))
    for kind in training:
        check_choice(kind, "training", get_args(Training))
    check_positive(batch_size, "batch_size")
    check_positive(prompts, "prompts")
    rows = {share: task_rows(share) for share in contaminated}
    look = make_look(source, harmful, prompts, limit=limit)
    seen = {"source": describe_source(source), **look.settings}
    estimate = _SECONDS_BESIDE + SECONDS_A_LOOK * len(at) + _SECONDS_A_STEP * max(at)
    cells = [
        Cell("before", _SECONDS_BESIDE + SECONDS_A_LOOK, lambda: {"looks": [_before(source, look)]}, seen, always=True)
    ]
    for kind, share, (name, arm) in itertools.product(training, contaminated, arms.items()):
        if kind not in arm.training:
            continue
        lora = kind == "lora"
        options: dict[str, Any] = {
            "at": at,
            "learning_rate": arm.learning_rate * (lora_learning_rate if lora else learning_rate),
            "batch_size": batch_size,
            "precision": precision,
            "seed": seed,
        }
        run = partial(_fit, source, arm, look=look, rows=rows[share], lora=lora, **options)
        described = {
            "callbacks": describe_settings(arm.callbacks),
            "start_share": arm.start_share,
            "rows": describe_rows(rows[share]),
        }
        cells.append(Cell(f"{kind}/{_data_name(share)}/{name}", estimate, run, seen | options | described))
    shared = {**seen, "at": at, "batch_size": batch_size, "precision": precision, "seed": seed}
    run_study_cells(cells, write_preservation, output=output, shared=shared, hours=hours, only=only)


def _before(source: str | os.PathLike[str], look: Look) -> dict[str, Any]:
    return {"step": 0, "training_seconds": 0.0, "metrics": {}, **look(load_causal_lm(source, dtype="float32"))}


def _fit(
    source: str | os.PathLike[str],
    arm: Arm,
    *,
    rows: Sequence[Example],
    batch_size: int,
    lora: bool,
    **options: Any,
) -> dict[str, Any]:
    data = InstructionDataModule(list(rows), batch_size=batch_size, max_length=512, seed=options["seed"])
    make_module = partial(
        CausalLanguageModule,
        source,
        dtype="float32",
        learning_rate=options.pop("learning_rate"),
        schedule="constant",
        lora=LORA if lora else None,
    )
    return {"looks": fit_and_look(make_module, data, arm.callbacks, start_share=arm.start_share, **options)[1]}


def _data_name(share: float) -> str:
    return f"contaminated-{100 * share:g}" if share else "benign"
