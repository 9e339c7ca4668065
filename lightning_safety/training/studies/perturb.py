# SPDX-License-Identifier: Apache-2.0
"""Whether noise on the weights of highest score harms safety more than noise elsewhere."""

from __future__ import annotations

import itertools
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, get_args

from lightning_safety.arguments import check_choice, check_fraction, check_positive
from lightning_safety.enforcement import perturbed_weights
from lightning_safety.enforcement.perturbation import PAPER_NOISE, check_noise
from lightning_safety.language import load_causal_lm, load_tokenizer
from lightning_safety.monitoring import PromptSource
from lightning_safety.report.studies.perturbation import write_perturbation
from lightning_safety.scoring import (
    RefusalMargin,
    SafetyMask,
    expected_safety_impact,
    select_bottom,
    select_random,
    select_top,
)
from lightning_safety.training.studies.cells import Cell, describe_source, run_study_cells
from lightning_safety.training.studies.watching import SECONDS_A_LOOK, make_look

Places = Literal["top", "random", "bottom"]


def perturb(
    source: str,
    *,
    places: list[Places] = ["top", "random", "bottom"],  # noqa: B006 # read, never changed
    fractions: list[float] = [0.001, 0.005, 0.01, 0.05],  # noqa: B006 # read, never changed
    noise: list[float] = [PAPER_NOISE, 0.1],  # noqa: B006 # read, never changed
    harmful: PromptSource = "harmful",
    prompts: int = 100,
    limit: int | None = None,
    seed: int = 0,
    only: list[str] | None = None,
    hours: float | None = 6.0,
    output: Path = Path("results/perturb"),
) -> None:
    """Add noise to some of a safe model's weights, look at it, and take the noise back; cell by cell.

    The validation of arXiv 2604.08297. Scores are `RefusalMargin`'s on ``harmful/score``. Weights stay in memory, and
    replies are forgotten once they are judged.

    Args:
        source: The model, made safe: a hub id, a folder or a GGUF file.
        places: Which weights: those of highest score, controls drawn at random, those of lowest score.
        fractions: Of the scored weights, in (0, 1].
        noise: In standard deviations of each weight's own tensor; the paper's 0.38 may break more than safety.
        harmful: Prompts that should be refused: a built-in set (its ``test`` split), a file or a hub data set.
        prompts: At most so many of them, spread evenly.
        limit: At most so many other prompts and tasks of each kind. None: all.
        seed: Of the noise and of the random places.
        only: Run these cells only, by name (``0.38/top/0.01``) or a part of it. None: run all.
        hours: Start no cell that is expected to end later than so many hours from now. None, ``--full``: run all.
        output: Folder of the results. Cells whose file is there are not run again.

    Raises:
        ValueError: An argument is out of range, or `output` holds cells of other settings.
        RuntimeError: Some cells failed; the others were run, and are in the results.
    """
    for place in places:
        check_choice(place, "places", get_args(Places))
    for fraction in fractions:
        check_fraction(fraction, "fractions")
    for one in noise:
        check_noise(one)
    check_positive(prompts, "prompts")
    look = make_look(source, harmful, prompts, limit=limit)

    @cache
    def model() -> Any:
        return load_causal_lm(source, dtype="float32")

    @cache
    def scores() -> Any:
        return expected_safety_impact(model(), RefusalMargin(), load_tokenizer(source))

    def mask(place: Places, fraction: float) -> SafetyMask:
        if place == "random":
            return select_random(scores(), fraction, seed)
        return (select_top if place == "top" else select_bottom)(scores(), fraction)

    def measure(strength: float, place: Places, fraction: float) -> dict[str, Any]:
        with perturbed_weights(model(), mask(place, fraction), noise=strength, seed=seed):
            return look(model())

    settings = {"source": describe_source(source), **look.settings}
    cells = [Cell("before", SECONDS_A_LOOK, lambda: look(model()), settings, always=True)]
    cells += [
        Cell(
            f"{strength:g}/{place}/{fraction:g}",
            SECONDS_A_LOOK,
            partial(measure, strength, place, fraction),
            {**settings, "seed": seed},
        )
        for strength, place, fraction in itertools.product(noise, places, fractions)
    ]
    run_study_cells(cells, write_perturbation, output=output, shared=settings | {"seed": seed}, hours=hours, only=only)
