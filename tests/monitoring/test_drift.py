# SPDX-License-Identifier: Apache-2.0
"""Checkpoints compared from files: every number against plain float64 decompositions."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lightning_safety.language.weight_files import WeightFiles
from lightning_safety.monitoring import drift, updates
from lightning_safety.monitoring.drift import (
    DriftRow,
    compare_checkpoints,
    summarise_drift,
    write_drift,
    write_summaries,
)
from lightning_safety.monitoring.drift_figure import draw_drift
from lightning_safety.monitoring.references import alignment_bases
from lightning_safety.monitoring.subspace import energy_kept_ratio, left_basis, subspace_overlap
from tests.monitoring.test_subspace import noise, with_spectrum

SHAPES = {
    "model.layers.0.self_attn.q_proj.weight": (24, 24),
    "model.layers.0.mlp.up_proj.weight": (60, 24),
    "model.layers.1.mlp.down_proj.weight": (24, 60),
    "model.layers.1.mlp.experts.down_proj": (2, 20, 30),
    "model.norm.weight": (24,),
}
ENERGIES = (0.1, 0.5, 0.9, 0.99)


def update(shape: tuple[int, ...], seed: int) -> Tensor:
    if len(shape) == 1:
        return 0.01 * noise(*shape, seed=seed)
    if len(shape) == 3:
        return torch.stack([update(shape[1:], seed + number) for number in range(shape[0])])
    return 0.01 * with_spectrum(*shape, 0.8 ** torch.arange(float(min(shape))), seed)


@pytest.fixture
def checkpoints(tmp_path: Path) -> dict[str, dict[str, Tensor]]:
    """Four checkpoints, saved under their names in `tmp_path`."""
    base = {name: noise(*shape, seed=1) for name, shape in SHAPES.items()}
    aligned = {name: weight + update(SHAPES[name], 2) for name, weight in base.items()}
    finetuned = {name: weight + update(SHAPES[name], 3) + update(SHAPES[name], 2) for name, weight in aligned.items()}
    other = {name: weight + update(SHAPES[name], 4) for name, weight in aligned.items()}
    found = {"base": base, "aligned": aligned, "finetuned": finetuned, "other": other}
    for name, weights in found.items():
        (tmp_path / name).mkdir()
        save_file(weights, tmp_path / name / "model.safetensors")
    return found


def plain(name: str, weights: dict[str, dict[str, Tensor]], first: str, second: str) -> Tensor:
    tensor, _, number = name.partition("[")
    difference = weights[first][tensor].double() - weights[second][tensor].double()
    if number:
        difference = difference[int(number.removesuffix("]"))]
    return difference[:, None] if difference.dim() == 1 else difference


def compare(folder: Path, *others: str, **options: object) -> list[DriftRow]:
    return compare_checkpoints(
        *(folder / name for name in ("base", "aligned", "finetuned", *others)),
        energies=ENERGIES,
        show_progress=False,
        **options,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("part", [37, 1 << 20])
def test_every_row_equals_plain_decompositions(
    tmp_path: Path, checkpoints: dict[str, dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch, part: int
) -> None:
    monkeypatch.setattr(drift, "_PART_ENTRIES", part)
    rows = compare(tmp_path, "other")
    assert len(rows) == 6 * 3 * len(ENERGIES)
    origins = {"finetuned": "aligned", "aligned": "base", "other": "aligned"}
    for row in rows:
        first, second = row.pair.split(" | ")
        update, reference = (plain(row.tensor, checkpoints, key, origins[key]) for key in (first, second))
        bases = [left_basis(matrix, energy=row.energy) for matrix in (update, reference)]
        assert (row.update_rank, row.reference_rank) == (bases[0].rank, bases[1].rank)
        assert row.overlap == pytest.approx(subspace_overlap(*bases), abs=1e-4)
        assert row.energy_kept == pytest.approx(energy_kept_ratio(update, bases[1]), abs=1e-4)
        assert row.overlap_random == max(bases[0].rank, bases[1].rank) / len(update)
        assert row.energy_kept_random == bases[1].rank / len(update)
        assert row.cosine == pytest.approx(
            float((update * reference).sum() / update.norm() / reference.norm()), abs=1e-8
        )
        assert row.update_norm == pytest.approx(float(update.norm()))
        assert row.reference_norm == pytest.approx(float(reference.norm()))


def test_layers_and_components(tmp_path: Path, checkpoints: dict[str, dict[str, Tensor]]) -> None:
    rows = compare(tmp_path)
    assert {row.tensor: (row.layer, row.component) for row in rows} == {
        "model.layers.0.self_attn.q_proj.weight": ("0", "q"),
        "model.layers.0.mlp.up_proj.weight": ("0", "up"),
        "model.layers.1.mlp.down_proj.weight": ("1", "down"),
        "model.layers.1.mlp.experts.down_proj[0]": ("1", "expert"),
        "model.layers.1.mlp.experts.down_proj[1]": ("1", "expert"),
        "model.norm.weight": ("other", "norm"),
    }


def test_summaries(tmp_path: Path, checkpoints: dict[str, dict[str, Tensor]]) -> None:
    rows = compare(tmp_path)
    found = {(one.group, one.energy): one for one in summarise_drift(rows)}
    assert [group for group, energy in found if energy == 0.5] == [
        "all", "component q", "component up", "component down", "component expert", "component norm",
        "layer 0", "layer 1", "layer other",
    ]  # fmt: skip
    half = [row for row in rows if row.energy == 0.5]
    everything = found["all", 0.5]
    assert everything.matrices == 6
    assert everything.overlap == pytest.approx(sum(row.overlap for row in half) / 6)
    total = sum(row.update_norm**2 for row in half)
    assert everything.energy_kept == pytest.approx(sum(row.energy_kept * row.update_norm**2 for row in half) / total)
    pooled = [torch.cat([plain(r.tensor, checkpoints, *pair).flatten() for r in half]) for pair in
              (("finetuned", "aligned"), ("aligned", "base"))]  # fmt: skip
    assert everything.cosine == pytest.approx(float(pooled[0] @ pooled[1] / pooled[0].norm() / pooled[1].norm()))
    ranks, dimensions = [], []
    for row in half:
        pair = plain(row.tensor, checkpoints, "finetuned", "aligned"), plain(row.tensor, checkpoints, "aligned", "base")
        ranks.append([left_basis(matrix, energy=0.5).rank for matrix in pair])
        dimensions.append(len(pair[0]))
    places = range(6)
    assert everything.overlap_random == pytest.approx(sum(max(ranks[i]) / dimensions[i] for i in places) / 6)
    assert everything.energy_kept_random == pytest.approx(
        sum(ranks[i][1] / dimensions[i] * half[i].update_norm ** 2 for i in places) / total
    )


def test_random_summaries_by_hand(tmp_path: Path, checkpoints: dict[str, dict[str, Tensor]]) -> None:
    row = replace(compare(tmp_path, include="*q_proj*")[0], overlap=0.5, reference_norm=1.0)
    rows = [
        replace(row, update_norm=1.0, overlap_random=0.2, energy_kept_random=0.1),
        replace(row, update_norm=3.0, overlap_random=0.4, energy_kept_random=0.5),
        replace(row, update_norm=0.0, overlap_random=math.nan, energy_kept_random=math.nan),
    ]
    everything = summarise_drift(rows)[0]
    assert everything.overlap_random == pytest.approx(0.3)  # (0.2 + 0.4) / 2
    assert everything.energy_kept_random == pytest.approx(0.46)  # (1 · 0.1 + 9 · 0.5) / 10


def test_a_checkpoint_that_did_not_move(tmp_path: Path, checkpoints: dict[str, dict[str, Tensor]]) -> None:
    rows = compare_checkpoints(
        tmp_path / "base", tmp_path / "aligned", tmp_path / "aligned", energies=[0.5], show_progress=False
    )
    assert all(row.update_rank == 0 and row.update_norm == 0 for row in rows)
    assert all(math.isnan(value) for row in rows for value in (row.overlap, row.energy_kept, row.cosine))
    everything = summarise_drift(rows)[0]
    assert math.isnan(everything.overlap)
    assert math.isnan(everything.energy_kept)


def test_csv(tmp_path: Path, checkpoints: dict[str, dict[str, Tensor]]) -> None:
    rows = compare(tmp_path, include="*mlp*")
    write_drift(rows, tmp_path / "drift.csv")
    with (tmp_path / "drift.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["tensor"] for line in lines] == [row.tensor for row in rows]
    assert [float(line["overlap"]) for line in lines] == [row.overlap for row in rows]


def test_summaries_as_csv(tmp_path: Path, checkpoints: dict[str, dict[str, Tensor]]) -> None:
    summaries = summarise_drift(compare(tmp_path, "other"))
    write_summaries(summaries, tmp_path / "summary.csv")
    with (tmp_path / "summary.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 9 * 3 * len(ENERGIES)
    assert [(line["group"], line["pair"], float(line["energy"])) for line in lines] == [
        (one.group, one.pair, one.energy) for one in summaries
    ]
    assert [float(line["energy_kept_random"]) for line in lines] == [one.energy_kept_random for one in summaries]


def test_figure_shows_both_quantities_beside_random(tmp_path: Path, checkpoints: dict[str, dict[str, Tensor]]) -> None:
    pytest.importorskip("matplotlib")
    summaries = summarise_drift(compare(tmp_path))
    axes = draw_drift(summaries, "finetuned | aligned").axes
    assert [one.get_ylabel() for one in axes] == ["subspace overlap"] * 2 + ["energy kept"] * 2
    rows = [one for one in summaries if one.group == "component q"]
    for place, name in ((0, "overlap"), (2, "energy_kept")):
        drawn, random = axes[place].lines[:2]
        assert list(drawn.get_ydata()) == [getattr(row, name) for row in rows]
        assert list(random.get_ydata()) == [getattr(row, f"{name}_random") for row in rows]


def test_each_update_is_decomposed_once(
    tmp_path: Path, checkpoints: dict[str, dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    decomposed, read = [], []
    spectrum_of_gram, read_part = updates.spectrum_of_gram, WeightFiles.read_part

    def counted(gram: Tensor, *rest: object) -> object:
        decomposed.append(gram)
        return spectrum_of_gram(gram, *rest)  # type: ignore[arg-type]

    def counted_read(files: WeightFiles, *rest: object) -> Tensor:
        read.append(files.name)
        return read_part(files, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(updates, "spectrum_of_gram", counted)
    monkeypatch.setattr(WeightFiles, "read_part", counted_read)
    for include in ("*up_proj*", "*layers.1.mlp.down_proj*"):
        decomposed.clear()
        read.clear()
        assert len(compare(tmp_path, "other", include=include)) == 3 * len(ENERGIES)
        assert len(decomposed) == 3
        assert len(read) == 4


def test_only_weights_that_are_compared_are_checked(tmp_path: Path, checkpoints: dict[str, dict[str, Tensor]]) -> None:
    changed = {**checkpoints["base"], "model.norm.weight": torch.ones(25), "vision.weight": torch.ones(3, 3)}
    save_file(changed, tmp_path / "base" / "model.safetensors")
    assert len(compare(tmp_path, include="*mlp*")) == 4 * len(ENERGIES)
    name = "model.layers.0.mlp.up_proj.weight"
    bases = alignment_bases(tmp_path / "base", tmp_path / "aligned", [name], energy=0.5, show_progress=False)
    assert list(bases) == [name]
    with pytest.raises(ValueError, match=r"`model.norm.weight` is \(25,\) in .* Leave it out with `include`"):
        compare(tmp_path, include="*.norm.*")
    save_file({**changed, "model.norm.weight": torch.ones(24)}, tmp_path / "base" / "model.safetensors")
    for include in ("*", ["*mlp*", "vision*"]):
        with pytest.raises(ValueError, match=r"holds `vision.weight` and .* does not\. .* Leave it out with `include`"):
            compare(tmp_path, include=include)
    with pytest.raises(ValueError, match=r"`reference` expected checkpoints .* they have no `nothing`"):
        alignment_bases(tmp_path / "base", tmp_path / "aligned", ["nothing"], energy=0.5)
    with pytest.raises(ValueError, match=r"holds `vision.weight` and .* does not"):
        alignment_bases(tmp_path / "base", tmp_path / "aligned", ["vision.weight"], energy=0.5)


def test_bad_input(tmp_path: Path, checkpoints: dict[str, dict[str, Tensor]]) -> None:
    with pytest.raises(ValueError, match=r"`include` expected to match .* '\*k_proj\*' matches none"):
        compare(tmp_path, include="*k_proj*")
    with pytest.raises(ValueError, match="`energies` expected to be in \\(0, 1\\] but got 5"):
        compare_checkpoints(tmp_path / "base", tmp_path / "aligned", tmp_path / "other", energies=[5])
    broken = {**checkpoints["finetuned"], "model.norm.weight": torch.full((24,), math.inf)}
    save_file(broken, tmp_path / "finetuned" / "model.safetensors")
    with pytest.raises(ValueError, match=r"`model.norm.weight` expected to be finite"):
        compare(tmp_path)
    save_file({**broken, "conv": torch.ones(2, 2, 2, 2)}, tmp_path / "finetuned" / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"one architecture expected but .*finetuned' holds `conv` and .*base' does not"
    ):
        compare(tmp_path)
