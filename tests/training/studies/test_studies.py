# SPDX-License-Identifier: Apache-2.0
"""Every study in small: a tiny random model, through the command line, twice."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_safety.cli import main
from lightning_safety.language import load_causal_lm
from lightning_safety.report.studies.results import STUDIES as PAGE
from lightning_safety.training.studies import STUDIES
from tests.tiny import make_tiny_model, make_tiny_tokenizer

LOOKED_AT = {"rates", "perplexity", "exact_match"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a model before and after alignment: the second with every weight a little moved."""
    folders = tmp_path_factory.mktemp("before"), tmp_path_factory.mktemp("after")
    for number, folder in enumerate(folders):
        model = make_tiny_model()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for weight in model.parameters():
                weight += number * 0.02 * torch.randn(weight.shape, generator=generator)
        model.save_pretrained(folder)
        make_tiny_tokenizer().save_pretrained(folder)
    return folders


@pytest.fixture(autouse=True)
def nothing_is_written_elsewhere(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    here = tmp_path_factory.mktemp("here")
    monkeypatch.chdir(here)
    yield
    assert list(here.rglob("*")) == []


def run(study: str, output: Path, *words: str) -> dict[str, dict[str, Any]]:
    """Run a study and return its cells."""
    main(["study", study, f"--output={output}", "--limit=4", *words])
    cells = output / "cells"
    return {
        path.relative_to(cells).with_suffix("").as_posix(): json.loads(path.read_text(encoding="utf-8"))
        for path in cells.rglob("*.json")
    }


def assert_runs_once_and_keeps_no_weights(study: str, output: Path, *words: str) -> dict[str, dict[str, Any]]:
    found = run(study, output, *words)
    stamps = {path: path.stat().st_mtime_ns for path in (output / "cells").rglob("*.json")}
    assert run(study, output, *words) == found
    assert {path: path.stat().st_mtime_ns for path in (output / "cells").rglob("*.json")} == stamps
    # No weights and no replies are left.
    assert {path.suffix for path in output.rglob("*") if path.is_file()} == {".json", ".md", ".png"}
    return found


def test_every_study_has_its_place_on_the_page() -> None:
    assert set(PAGE) == set(STUDIES)


@pytest.mark.filterwarnings("ignore")
def test_pattern(models: tuple[Path, Path], tmp_path: Path) -> None:
    words = [f"--models={{before: {models[0]}, after: {models[1]}}}", "--resamples=2", "--fraction=0.1"]
    found = assert_runs_once_and_keeps_no_weights("pattern", tmp_path, *words)
    assert set(found) == {"before", "after"}
    for one in found.values():
        groups = one["components"]
        # Enrichment is against size: over all weights it is 1.
        assert sum(group["enrichment"] * group["weights"] for group in groups) / one["scored"] == pytest.approx(1)
        assert sum(group["selected"] for group in groups) == one["selected"] == int(0.1 * one["scored"])
        assert len(one["jaccard"]) == 2
        assert 0.1 < min(one["jaccard"]) < 1
    assert found["before"]["components"] != found["after"]["components"]


@pytest.mark.filterwarnings("ignore")
def test_perturb(models: tuple[Path, Path], tmp_path: Path) -> None:
    words = [f"--source={models[0]}", "--prompts=3", "--fractions=[0.01, 1.0]", "--noise=[0.1, 1.5]"]
    found = assert_runs_once_and_keeps_no_weights("perturb", tmp_path, *words, "--only", "top", "random")
    places = ("top/0.01", "top/1", "random/0.01", "random/1")
    assert set(found) == {"before", *(f"{noise}/{place}" for noise in (0.1, 1.5) for place in places)}
    assert all(set(one) >= LOOKED_AT for one in found.values())
    values = {name: one["perplexity"]["value"] for name, one in found.items()}
    assert all(values[f"0.1/{place}"] != values[f"1.5/{place}"] for place in places)
    # Of all weights, the highest and random ones are the same; and no cell begins with the noise of another.
    assert values["1.5/top/1"] == values["1.5/random/1"] != values["before"]
    again = run("perturb", tmp_path / "again", *words, "--only", "1.5/random/0.01")
    assert again["1.5/random/0.01"]["perplexity"] == found["1.5/random/0.01"]["perplexity"]


@pytest.mark.filterwarnings("ignore")
def test_cells_that_are_not_asked_for_must_be_of_the_same_settings(
    models: tuple[Path, Path], tmp_path: Path, capsys: Any
) -> None:
    words = [f"--source={models[0]}", "--prompts=2", "--fractions=[0.1]", "--noise=[0.38]"]
    run("perturb", tmp_path, *words, "--only", "top")
    plan = (tmp_path / "plan.json").read_text(encoding="utf-8")
    with pytest.raises(SystemExit):
        run("perturb", tmp_path, *words, "--seed=1", "--only", "random")
    assert "`seed` expected to be 0, which" in capsys.readouterr().err
    # The model under the same name is another one, and nothing of the study was touched.
    weights = models[0] / "model.safetensors"
    before = weights.read_bytes()
    weights.write_bytes((models[1] / "model.safetensors").read_bytes())
    try:
        with pytest.raises(SystemExit):
            run("perturb", tmp_path, *words, "--only", "random")
    finally:
        weights.write_bytes(before)
    assert "`source` expected to be" in capsys.readouterr().err
    assert (tmp_path / "plan.json").read_text(encoding="utf-8") == plan
    # Cells of a wider plan stay in the results, and those never run are forgotten.
    found = run("perturb", tmp_path, *words, "--fractions=[0.2]", "--only", "bottom")
    assert set(found) == {"before", "0.38/top/0.1", "0.38/bottom/0.2"}
    table = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert "| top | 10 % |" in table
    assert "| bottom | 20 % |" in table
    assert "- 0.38/top: 0.2 (" in table
    # But not beside others of another seed.
    with pytest.raises(SystemExit):
        run("perturb", tmp_path, *words, "--fractions=[0.3]", "--seed=1", "--only", "bottom")
    assert "`seed` expected to be 0, which" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")
def test_seeds_of_a_random_control_are_other_weights(models: tuple[Path, Path], tmp_path: Path) -> None:
    words = [f"--source={models[0]}", "--prompts=2", "--at=[1]", "--batch_size=4", "--seeds=[0, 1]"]
    chosen = "{class_path: lightning_safety.SafetyEnhancementTuning, init_args: {fraction: 0.5, method: random}}"
    # One row that is always there: its order is the same.
    words += [f"--arms.drawn={{callbacks: [{chosen}]}}", "--data.retained=[{source: harmful, limit: 1, share: 1.0}]"]
    found = run("enhance", tmp_path, *words, "--only", "drawn")
    values = [found[f"seed-{seed}/drawn"]["looks"][0]["perplexity"]["value"] for seed in (0, 1)]
    assert values[0] != values[1]


@pytest.mark.filterwarnings("ignore")
def test_enhance(models: tuple[Path, Path], tmp_path: Path) -> None:
    words = [f"--source={models[0]}", "--prompts=3", "--at=[1, 2]", "--batch_size=4", "--seeds=[0]"]
    words += ["--data.retained=[{source: harmful, share: 0.5}, {source: harmless, share: 0.5}]"]
    arms = ["top", "random", "all", "top-refusals-only", "top-minus-utility"]
    found = assert_runs_once_and_keeps_no_weights("enhance", tmp_path, *words, "--only", *arms)
    assert set(found) == {"before", *(f"seed-0/{arm}" for arm in arms)}
    ends = {}
    for name, one in found.items():
        if name != "before":
            assert [look["step"] for look in one["looks"]] == [1, 2]
            ends[name] = one["looks"][-1]["perplexity"]["value"]
    assert len({*ends.values(), found["before"]["looks"][0]["perplexity"]["value"]}) == 1 + len(arms)


@pytest.mark.filterwarnings("ignore")
def test_subspaces(models: tuple[Path, Path], tmp_path: Path) -> None:
    words = [f"--base={models[0]}", f"--aligned={models[1]}", "--updates={useful: 0.0, harmful: 1.0}"]
    words += ["--fractions=[0.5, 1.0]", "--steps=3", "--prompts=3", "--learning_rate=1e-2"]
    found = assert_runs_once_and_keeps_no_weights("subspaces", tmp_path, *words, "--only", "useful", "overlaps")
    aligned, whole = found["aligned"]["perplexity"]["value"], found["useful/whole"]["perplexity"]["value"]
    assert whole < aligned
    # What lies inside of the directions and what lies outside are together the whole update.
    for of in ("top", "random", "random_own"):
        kept = [found[f"useful/{of}-{kind}-0.5"]["energy_kept"] for kind in ("parallel", "orthogonal")]
        assert sum(kept) == pytest.approx(1)
        assert kept[0] < found[f"useful/{of}-parallel-1"]["energy_kept"]
        value = found[f"useful/{of}-parallel-0.5"]["perplexity"]["value"]
        assert value not in (aligned, whole)
    assert set(found["overlaps"]["pairs"]) == {"alignment | useful", "alignment | harmful", "useful | harmful"}


@pytest.mark.filterwarnings("ignore")
def test_activations(models: tuple[Path, Path], tmp_path: Path) -> None:
    words = [f"--models={{before: {models[0]}, after: {models[1]}}}"]
    found = assert_runs_once_and_keeps_no_weights("activations", tmp_path, *words)
    assert set(found) == {f"{other}/{name}" for other in ("harmless", "borderline") for name in ("before", "after")}
    assert found["harmless/before"]["prompts"] == [4, 4]
    assert list(found["harmless/before"]["layers"]) == ["0", "1", "2"]
    assert found["harmless/before"]["layers"]["2"] != found["harmless/after"]["layers"]["2"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["perturb", "--fractions=[2.0]"], "`fractions` expected to be in (0, 1] but got 2.0"),
        (["perturb", "--noise=[-1]"], "`noise` expected to be"),
        (["perturb", "--only", "topp"], "`only` expected to be one of 'before', '0.38', 'top', "),
        (["enhance", "--at=[0]"], "`at` expected optimizer steps of at least 1 but got [0]"),
        (
            ["enhance", "--arms.new.data=none"],
            "`data` expected to be one of 'retained', 'unlikely', 'refusals' but got 'none'",
        ),
        (["enhance", "--arms.top.callbacks=[{class_path: lightning_safety.HarmfulnessMonitor}]"], "none that writes"),
        (["enhance", "--arms={a/b: {}}"], "`arms` expected names without a slash but got 'a/b'"),
        (["subspaces", "--updates={useful: 1.5}"], "`contaminated` expected shares in [0, 1]"),
        (["subspaces", "--steps=0"], "`steps` expected to be at least 1 but got 0"),
        (["pattern", "--fraction=0"], "`fraction` expected to be in (0, 1] but got 0"),
        (["pattern", "--resamples=0"], "`resamples` expected to be at least 1 but got 0"),
        (["activations", "--energy=0"], "`energy` expected to be in (0, 1] but got 0"),
    ],
)
def test_bad_settings_are_refused_and_leave_nothing(
    words: list[str], message: str, models: tuple[Path, Path], tmp_path: Path, capsys: Any
) -> None:
    sources = {
        "pattern": [f"--models={{before: {models[0]}}}"],
        "activations": [f"--models={{before: {models[0]}}}"],
        "perturb": [f"--source={models[0]}"],
        "enhance": [f"--source={models[0]}"],
        "subspaces": [f"--base={models[0]}", f"--aligned={models[1]}"],
    }
    with pytest.raises(SystemExit):
        run(words[0], tmp_path, *sources[words[0]], *words[1:])
    assert message in capsys.readouterr().err
    assert not list(tmp_path.rglob("*"))


def test_the_models_of_the_studies_differ(models: tuple[Path, Path]) -> None:
    before, after = (load_causal_lm(folder, dtype="float32").state_dict() for folder in models)
    assert all(not torch.equal(weight, after[name]) for name, weight in before.items())
