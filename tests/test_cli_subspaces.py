# SPDX-License-Identifier: Apache-2.0
"""The commands `subspace` and `project`, from folders to files."""

from __future__ import annotations

import csv
import re
import sys
from pathlib import Path

import pytest
import torch

from lightning_safety.cli import main
from lightning_safety.language import load_causal_lm, save_language_model
from tests.tiny import make_tiny_model, make_tiny_tokenizer


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    """The options that name base, aligned and finetuned models."""
    options = []
    for moves, name in enumerate(("base", "aligned", "finetuned")):
        model = make_tiny_model()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for _ in range(moves):
                for weight in model.parameters():
                    weight.add_(0.01 * torch.randn(weight.shape, generator=generator))
        options += [f"--{name}", str(save_language_model(model, make_tiny_tokenizer(), tmp_path / name))]
    return options


def test_subspace_writes_table_and_figure(
    folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = ["--other", folders[3]]
    main(["subspace", *folders, *other, "--energies", "[0.5, 0.9]", "-o", str(tmp_path / "out")])
    shown = capsys.readouterr().out
    for words in ("finetuned | aligned", "other | aligned", "finetuned | other", "component q", "(random)"):
        assert words in shown
    with (tmp_path / "out" / "drift.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert {line["energy"] for line in lines} == {"0.5", "0.9"}
    assert {line["pair"] for line in lines} == {"finetuned | aligned", "other | aligned", "finetuned | other"}
    with (tmp_path / "out" / "summary.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert {"all", "component q", "layer 0"} <= {line["group"] for line in lines}
    assert {(line["pair"], line["energy"]) for line in lines if line["group"] == "all"} == {
        (pair, energy)
        for pair in ("finetuned | aligned", "other | aligned", "finetuned | other")
        for energy in ("0.5", "0.9")
    }
    pictures = sorted(path.name for path in (tmp_path / "out").glob("*.png"))
    assert pictures == ["finetuned-aligned.png", "finetuned-other.png", "other-aligned.png"]
    assert all((tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG") for name in pictures)


def test_subspace_asks_for_matplotlib_first(
    folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("lightning_safety.monitoring.drift.compare_checkpoints", lambda *_, **__: pytest.fail("worked"))
    with pytest.raises(SystemExit) as stop:
        main(["subspace", *folders, "-o", str(tmp_path / "out")])
    assert stop.value.code == 1
    assert "needs matplotlib" in capsys.readouterr().err


def test_subspace_shows_the_table_before_it_draws(
    folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ValueError("no picture")

    monkeypatch.setattr("lightning_safety.monitoring.drift_figure.draw_drift", fail)
    with pytest.raises(SystemExit):
        main(["subspace", *folders, "--energies", "[0.5]", "-o", str(tmp_path / "out")])
    assert "component q" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["drift.csv", "summary.csv"]


def test_project_writes_a_model(folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["project", *folders, "--kind", "parallel", "--fraction", "0.25", "-o", str(tmp_path / "out")])
    shown = capsys.readouterr().out
    assert "% of the update's energy kept" in shown
    assert re.search(r"Of \d+ matrices, 0 have fewer directions than asked for; of 0 the directions are approx", shown)
    load_causal_lm(tmp_path / "out")


def test_checkpoints_are_named(folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["subspace", *folders[:4], "-o", str(tmp_path / "out")])
    assert stop.value.code == 2
    assert "finetuned" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["subspace", *folders[:5], str(tmp_path / "nowhere"), "-o", str(tmp_path / "out")])
    assert stop.value.code == 1
    assert "expected to be a folder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
