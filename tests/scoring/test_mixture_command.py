# SPDX-License-Identifier: Apache-2.0
"""`lightning-safety score` and `mask describe` on a mixture of experts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from lightning_safety.cli import main
from lightning_safety.scoring import SafetyMask
from tests.scoring.mixtures import make_mixture, starve


@pytest.fixture
def folder(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    model = make_mixture("qwen3_moe")
    starve(model, 3)
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_the_pattern_by_expert_is_printed(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(tmp_path / "mask.safetensors")
    main(["score", str(folder), "-o", file, "--fraction", "0.05", "--limit", "6"])
    shown = capsys.readouterr().out
    assert "layer/expert" in shown
    rows = {line.split()[0]: line.split()[1:] for line in shown.splitlines() if "/" in line.split(" ")[0]}
    assert [name for name in rows if name != "layer/expert"] == [
        f"{layer}/{expert}" for layer in (0, 1) for expert in range(5)
    ]
    assert rows["0/3"] == rows["1/3"] == ["unscored", "–", "–", "–", "0.0", "%"]
    loads = [float(rows[f"0/{expert}"][-2]) for expert in range(5)]
    assert sum(loads) == pytest.approx(200, abs=0.3)
    main(["mask", "describe", file])
    described = capsys.readouterr().out
    assert "0/3           unscored" in described
    assert "load" not in described


def test_patterns_may_be_given(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mask.safetensors"
    words = [
        "score",
        folder,
        "-o",
        file,
        "--limit",
        "2",
        "--experts",
        "*.mlp.experts",
        "--routers",
        "*.mlp.gate",
        "*.q_norm",
    ]
    main([str(word) for word in words])
    metadata = SafetyMask.load(file).metadata
    assert (metadata["experts"], json.loads(metadata["routers"])) == ('["*.mlp.experts"]', ["*.mlp.gate", "*.q_norm"])
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main([str(word) for word in [*words[:6], "--experts", "*.nowhere", "--routers", "*.mlp.gate"]])
    assert "'*.nowhere' matches none" in capsys.readouterr().err


def test_objectives_are_compared(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rank correlations are over what both objectives score."""
    file = str(tmp_path / "mask.safetensors")
    main(["score", str(folder), "-o", file, "--limit", "2", "--compare", "[refusal_likelihood]"])
    (correlations,) = (line for line in capsys.readouterr().out.splitlines() if line.endswith(" 1.000"))
    assert 0 < float(correlations.split()[1]) < 1
