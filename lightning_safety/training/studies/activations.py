# SPDX-License-Identifier: Apache-2.0
"""How far a model's activations tell harmful prompts from harmless ones, layer by layer, before and after."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from lightning_safety.arguments import check_fraction
from lightning_safety.language import load_causal_lm, load_tokenizer
from lightning_safety.monitoring import compare_activations, last_token_activations, read_prompts
from lightning_safety.monitoring.rates import finite_or_none
from lightning_safety.report.studies.activations import write_activations
from lightning_safety.training.studies.cells import Cell, describe_rows, describe_source, run_study_cells

_SECONDS_A_MODEL = 90.0


def activations(
    models: dict[str, str],
    *,
    against: list[str] = ["harmless", "borderline"],  # noqa: B006 # read, never changed
    layers: list[float] = [0.0, 1.0],  # noqa: B006 # read, never changed
    energy: float = 0.6,
    limit: int | None = None,
    seed: int = 0,
    only: list[str] | None = None,
    hours: float | None = 6.0,
    output: Path = Path("results/activations"),
) -> None:
    """Compare what models make of harmful and of other prompts: overlap beside its controls, and separability.

    The section on activations of arXiv 2505.14185, on the built-in ``test`` splits. Prompts are read, not replied to.

    Args:
        models: By name: a hub id, a folder or a GGUF file.
        against: Built-in sets to compare the harmful prompts with.
        layers: Shares (low, high) of the hidden states, or their numbers; the paper takes 0.65 and 0.90.
        energy: The share of Σσ² that a subspace keeps, in (0, 1].
        limit: At most so many prompts of each set. None: all.
        seed: Of the sets drawn at random and of the folds.
        only: Run these cells only, by model or set. None: run all.
        hours: Start no cell that is expected to end later than so many hours from now. None, ``--full``: run all.
        output: Folder of the results. Cells whose file is there are not run again.

    Raises:
        ValueError: An argument is out of range, or `output` holds cells of other settings.
        RuntimeError: Some cells failed; the others were run, and are in the results.
    """
    check_fraction(energy, "energy")
    sources = {name: describe_source(source) for name, source in models.items()}
    options: dict[str, Any] = {"layers": layers, "energy": energy, "limit": limit, "seed": seed}
    cells = [
        Cell(
            f"{other}/{name}",
            _SECONDS_A_MODEL,
            partial(_measure, source, other, **options),
            {"source": sources[name], "prompts": _digests(other, limit), **options},
        )
        for other in against
        for name, source in models.items()
    ]
    run_study_cells(cells, write_activations, output=output, shared=options, hours=hours, only=only)


def _digests(other: str, limit: int | None) -> dict[str, str]:
    return {name: describe_rows(read_prompts(name, name, split="test", limit=limit)[1]) for name in ("harmful", other)}


def _measure(
    source: str, other: str, *, layers: list[float], energy: float, limit: int | None, seed: int
) -> dict[str, Any]:
    model, tokenizer = load_causal_lm(source, dtype="float32"), load_tokenizer(source)
    found = []
    for name in ("harmful", other):
        prompts = [example.prompt for example in read_prompts(name, name, split="test", limit=limit)[1]]
        found.append(last_token_activations(model, tokenizer, prompts, layers=layers, show_progress=True))
    compared = compare_activations(*found, energy=energy, seed=seed)
    counts = [len(next(iter(one.values()))) for one in found]
    return {"prompts": counts, "layers": {number: _numbers(asdict(one)) for number, one in compared.items()}}


def _numbers(comparison: dict[str, Any]) -> dict[str, float | None]:
    """Return the values of a comparison that are numbers, None for NaN."""
    return {name: finite_or_none(value) for name, value in comparison.items() if isinstance(value, float)}
