# SPDX-License-Identifier: Apache-2.0
"""Subspaces of checkpoints: what fine-tuning and alignment have in common, and projections."""

from __future__ import annotations

from typing import Literal


def subspace(
    base: str,
    aligned: str,
    finetuned: str,
    output: str,
    other: str | None = None,
    energies: list[float] | None = None,
    include: list[str] | None = None,
) -> None:
    """Compare fine-tuning's updates with alignment's, tensor by tensor: overlap, energy kept and cosine.

    Writes `drift.csv` (every matrix at every energy), `summary.csv` (averages over all matrices, by component and by
    layer) and a figure for each pair of updates, and prints the averages.

    Args:
        base: The checkpoint before alignment: a folder, a .safetensors file or a hub id.
        aligned: The aligned checkpoint.
        finetuned: The checkpoint fine-tuned from it.
        output: The folder to write to.
        other: Another checkpoint fine-tuned from `aligned`, such as on harmful data.
        energies: Shares of energy in (0, 1]. Default: the eleven of arXiv 2505.14185.
        include: Shell-style patterns of the names to compare. Default: all.
    """
    from pathlib import Path

    from lightning_safety.drawing import check_matplotlib
    from lightning_safety.files import replace_atomically
    from lightning_safety.monitoring.drift import (
        compare_checkpoints,
        drift_table,
        summarise_drift,
        write_drift,
        write_summaries,
    )
    from lightning_safety.monitoring.drift_figure import draw_drift
    from lightning_safety.monitoring.updates import PAPER_ENERGIES

    check_matplotlib("The figure")
    rows = compare_checkpoints(
        base, aligned, finetuned, other, energies=energies or PAPER_ENERGIES, include=include or "*"
    )
    folder = Path(output)
    write_drift(rows, folder / "drift.csv")
    summaries = summarise_drift(rows)
    write_summaries(summaries, folder / "summary.csv")
    print(drift_table(summaries))
    for pair in dict.fromkeys(row.pair for row in rows):
        with replace_atomically(folder / f"{pair.replace(' | ', '-')}.png") as temporary:
            draw_drift(summaries, pair).savefig(temporary, format="png")
    print(f"\nEverything is in {folder}")


def project(
    base: str,
    aligned: str,
    finetuned: str,
    output: str,
    kind: Literal["parallel", "orthogonal", "opposite"] = "orthogonal",
    fraction: float = 0.5,
    directions: Literal["top", "random", "random_own"] = "top",
    seed: int = 0,
) -> None:
    """Write the aligned model with the fine-tuning update projected into alignment's subspace, or out of it.

    Args:
        base: The checkpoint before alignment: a folder, a .safetensors file or a hub id.
        aligned: The aligned checkpoint.
        finetuned: The checkpoint fine-tuned from it.
        output: The folder to write the projected model to.
        kind: `parallel` keeps what lies inside, `orthogonal` what lies outside, `opposite` negates what lies inside.
        fraction: Of the directions of each matrix, in (0, 1].
        directions: `top`, or a control: `random` for those of a random matrix, `random_own` for some of alignment's.
        seed: Of the controls.
    """
    from lightning_safety.monitoring.projection import project_checkpoint

    done = project_checkpoint(
        base, aligned, finetuned, output, kind=kind, fraction=fraction, directions=directions, seed=seed
    )
    print(f"{100 * done.energy_kept:.2f} % of the update's energy kept: {output}")
    print(
        f"Of {done.matrices} matrices, {done.capped} have fewer directions than asked for; of {done.approximated} the "
        "directions are approximate (sampled)."
    )
