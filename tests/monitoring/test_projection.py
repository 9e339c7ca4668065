# SPDX-License-Identifier: Apache-2.0
"""Projected checkpoints: arithmetic, controls, the folder that is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lightning_safety.language import load_causal_lm, save_language_model
from lightning_safety.language.weight_files import WeightFiles
from lightning_safety.monitoring import projection, subspace
from lightning_safety.monitoring.projection import Projection, project_checkpoint
from tests.tiny import make_tiny_model, make_tiny_tokenizer


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """Base, aligned and finetuned models of one architecture."""
    found = {}
    for name in ("base", "aligned", "finetuned"):
        model = make_tiny_model()
        with torch.no_grad():
            for step, other in enumerate(("aligned", "finetuned")):
                if name == other or (name == "finetuned" and other == "aligned"):
                    generator = torch.Generator().manual_seed(step)
                    for weight in model.parameters():
                        weight.add_(0.01 * torch.randn(weight.shape, generator=generator))
        found[name] = save_language_model(model, make_tiny_tokenizer(), tmp_path / name)
    return found


def project(folders: dict[str, Path], output: Path, **options: Any) -> tuple[float, dict[str, Tensor]]:
    done = project_checkpoint(*folders.values(), output, show_progress=False, **options)
    return done.energy_kept, weights(output)


def weights(folder: Path) -> dict[str, Tensor]:
    files = WeightFiles(folder)
    return {name: files.read(name) for name in files.shapes}


def reference(folders: dict[str, Path], name: str, fraction: float) -> tuple[Tensor, Tensor, Tensor]:
    """Aligned weight, update, and the part of it inside, by a full decomposition."""
    base, aligned, finetuned = (weights(folder)[name].double() for folder in folders.values())
    matrix = (aligned - base).reshape(len(aligned), -1)
    update = (finetuned - aligned).reshape(len(aligned), -1)
    rank = max(1, round(fraction * min(matrix.shape)))
    left = torch.linalg.svd(matrix, full_matrices=False).U[:, :rank]
    return aligned, (finetuned - aligned), (left @ (left.T @ update)).reshape(aligned.shape)


@pytest.mark.parametrize("kind", ["parallel", "orthogonal", "opposite"])
@pytest.mark.parametrize("fraction", [0.25, 1.0])
def test_weights_are_those_of_the_paper(tmp_path: Path, folders: dict[str, Path], kind: str, fraction: float) -> None:
    kept, found = project(folders, tmp_path / "out", kind=kind, fraction=fraction)
    energies = torch.zeros(2, dtype=torch.float64)
    for name, weight in found.items():
        aligned, update, inside = reference(folders, name, fraction)
        part = {"parallel": inside, "orthogonal": update - inside, "opposite": -inside}[kind]
        assert torch.allclose(weight.double(), aligned + part, atol=1e-6)
        energies += torch.stack([part.square().sum(), update.square().sum()])
    assert kept == pytest.approx(float(energies[0] / energies[1]), abs=1e-4)
    assert 0 < kept < 1 or fraction == 1.0


def test_controls_are_seeded_and_differ(tmp_path: Path, folders: dict[str, Path]) -> None:
    found = {}
    for directions in ("top", "random", "random_own"):
        for seed in (0, 1):
            options = {"directions": directions, "seed": seed, "kind": "parallel", "fraction": 0.25}
            found[directions, seed] = project(folders, tmp_path / f"{directions}{seed}", **options)[1]
    again = project(folders, tmp_path / "again", directions="random", seed=1, kind="parallel", fraction=0.25)[1]
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(again[name], found["random", 1][name])
    assert torch.equal(found["top", 0][name], found["top", 1][name])
    for key in (("random", 0), ("random_own", 0), ("random_own", 1)):
        assert not torch.equal(found[key][name], found["random", 1][name])
    assert not torch.equal(found["random_own", 0][name], found["random_own", 1][name])
    # Matrices of one shape are not projected onto one and the same random subspace.
    aligned = weights(folders["aligned"])
    moved = [
        torch.linalg.matrix_rank(torch.cat([found["random", 0][n] - aligned[n] for n in names], dim=1), rtol=1e-3)
        for names in ([name], [name, name.replace("layers.0", "layers.1")])
    ]
    assert moved[1] > moved[0]


def low_rank(folder: Path, rows: int, columns: int, dtype: torch.dtype, tail: float = 0.0) -> list[Path]:
    """Checkpoints of one matrix whose alignment update is of rank 3 but for rounding and a tail."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    base = (16 * noise(rows, columns)).to(dtype).double()
    aligned = base + noise(rows, 3) @ noise(3, columns) + tail * noise(rows, columns)
    found = []
    for name, weight in {"base": base, "aligned": aligned, "finetuned": aligned + noise(rows, columns)}.items():
        (folder / name).mkdir()
        save_file({"a.weight": weight.to(dtype)}, folder / name / "model.safetensors")
        found.append(folder / name)
    return found


@pytest.mark.parametrize("directions", ["top", "random", "random_own"])
def test_controls_have_the_rank_of_the_leading_directions(tmp_path: Path, directions: Any) -> None:
    checkpoints = low_rank(tmp_path, 40, 24, torch.float32)
    done = project_checkpoint(*checkpoints, tmp_path / "out", kind="parallel", directions=directions)
    assert done == Projection(done.energy_kept, matrices=1, capped=1, approximated=0)
    moved = weights(tmp_path / "out")["a.weight"].double() - weights(checkpoints[1])["a.weight"].double()
    # Rounding of float32 weights is no direction of the update, although differences are taken in float64.
    assert torch.linalg.matrix_rank(moved, rtol=1e-4) == 3


def test_float64_checkpoints_keep_their_precision(tmp_path: Path) -> None:
    done = project_checkpoint(*low_rank(tmp_path, 40, 24, torch.float64, tail=1e-6), tmp_path / "out")
    assert done.capped == 0


@pytest.mark.parametrize("directions", ["top", "random", "random_own"])
def test_sampled_decompositions_are_counted(tmp_path: Path, directions: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subspace, "LARGEST_EXACT", 64)
    monkeypatch.setattr(projection, "LARGEST_EXACT", 64)
    checkpoints = low_rank(tmp_path, 200, 160, torch.float32, tail=0.01)
    done = project_checkpoint(*checkpoints, tmp_path / "out", kind="parallel", fraction=0.1, directions=directions)
    assert done == Projection(done.energy_kept, matrices=1, capped=0, approximated=1)
    moved = weights(tmp_path / "out")["a.weight"].double() - weights(checkpoints[1])["a.weight"].double()
    assert torch.linalg.matrix_rank(moved, rtol=1e-4) == 16


@pytest.mark.parametrize("directions", ["top", "random", "random_own"])
def test_alignment_that_did_not_move_has_no_directions(
    tmp_path: Path, folders: dict[str, Path], directions: Any
) -> None:
    done = project_checkpoint(
        folders["aligned"], folders["aligned"], folders["finetuned"], tmp_path / "out", directions=directions
    )
    assert done.energy_kept == 1
    assert done.capped == done.matrices > 0


def test_the_folder_is_a_model(tmp_path: Path, folders: dict[str, Path]) -> None:
    project(folders, tmp_path / "out")
    model = load_causal_lm(tmp_path / "out")
    stored = weights(tmp_path / "out")
    assert all(torch.equal(weight, stored[name]) for name, weight in model.named_parameters() if name in stored)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        path.name for path in folders["aligned"].iterdir()
    )


def test_shards_and_types_are_those_of_the_aligned_checkpoint(tmp_path: Path, folders: dict[str, Path]) -> None:
    model = load_causal_lm(folders["aligned"]).bfloat16()
    model.save_pretrained(tmp_path / "sharded", max_shard_size="30KB")
    found = project({**folders, "aligned": tmp_path / "sharded"}, tmp_path / "out")[1]
    assert {weight.dtype for weight in found.values()} == {torch.bfloat16}
    index = "model.safetensors.index.json"
    assert json.loads((tmp_path / "out" / index).read_text()) == json.loads((tmp_path / "sharded" / index).read_text())


def test_bad_input_leaves_nothing(tmp_path: Path, folders: dict[str, Path]) -> None:
    before = sorted(tmp_path.rglob("*"))
    for options, message in (
        ({"kind": "across"}, "`kind` expected to be one of 'parallel', 'orthogonal', 'opposite' but got 'across'"),
        ({"directions": "best"}, "`directions` expected to be one of"),
        ({"fraction": 50}, "`fraction` expected to be in"),
    ):
        with pytest.raises(ValueError, match=message):
            project(folders, tmp_path / "out", **options)
    with pytest.raises(FileExistsError, match="`output` expected to be a new or empty folder"):
        project(folders, folders["base"])
    file = folders["finetuned"] / "model.safetensors"
    broken = weights(folders["finetuned"])
    broken[next(iter(broken))].fill_(float("nan"))
    save_file(broken, file)
    with pytest.raises(ValueError, match="expected to be finite"):
        project(folders, tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before
