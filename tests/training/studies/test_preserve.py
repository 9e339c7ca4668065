# SPDX-License-Identifier: Apache-2.0
"""The study of what preserves safety, on a tiny model: through the command line, cut short, and gone on with."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl

from lightning_safety.callbacks import SafetyPreservingAdaptation
from lightning_safety.cli import main
from lightning_safety.data import load_prompts
from lightning_safety.training.studies import Arm, preserve
from lightning_safety.training.studies.rows import task_rows
from tests.tiny import make_tiny_model, make_tiny_tokenizer


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_tiny_model().save_pretrained(folder)
    make_tiny_tokenizer().save_pretrained(folder)
    return folder


def run(source: Path, output: Path, *words: str) -> None:
    options = {
        "source": source,
        "output": output,
        "prompts": 3,
        "limit": 4,
        "at": "[1, 2]",
        "contaminated": "[0.0, 0.05]",
    }
    main(["study", "preserve", *(f"--{name}={value}" for name, value in options.items()), *words])


def read(folder: Path) -> dict[str, Any]:
    cells = folder / "cells"
    return {
        path.relative_to(cells).with_suffix("").as_posix(): json.loads(path.read_text(encoding="utf-8"))
        for path in cells.rglob("*.json")
    }


@pytest.mark.filterwarnings("ignore")
def test_the_study_runs_from_the_command_line_and_goes_on(source: Path, tmp_path: Path, capsys: Any) -> None:
    run(source, tmp_path, "--only=[plain, averaged]", "--training=[full]")
    names = {f"full/{data}/{arm}" for data in ("benign", "contaminated-5") for arm in ("plain", "averaged")}
    cells = read(tmp_path)
    assert set(cells) == names | {"before"}
    for cell in names:
        assert [look["step"] for look in cells[cell]["looks"]] == [1, 2]
    # One fit after the other from the same start: of the same data the same, and the average nearer to the start.
    perplexities = {name: cell["looks"][-1]["perplexity"]["value"] for name, cell in cells.items()}
    start, end = perplexities["before"], perplexities["full/benign/plain"]
    assert abs(perplexities["full/benign/averaged"] - start) < abs(end - start)
    assert perplexities["full/contaminated-5/plain"] != end
    printed = capsys.readouterr().out
    assert (tmp_path / "results.md").read_text(encoding="utf-8") in printed
    assert (tmp_path / "front-full.png").read_bytes().startswith(b"\x89PNG")
    assert "- full/benign: rehearsal, adaptive, rehearsal-2, " in printed  # not run, and said to be
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").rglob("*.json")}
    run(source, tmp_path, "--only=[plain, slower, spa-1]", "--training=[full, lora]")
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    more = {
        f"{kind}/{data}/{arm}"
        for kind in ("full", "lora")
        for data in ("benign", "contaminated-5")
        for arm in ("plain", "slower", "spa-1")
    }
    assert set(read(tmp_path)) == names | more | {"before"}
    # No weights and no replies are left.
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == {".json", ".md", ".png"}


@pytest.mark.filterwarnings("ignore")
def test_cells_of_an_arm_do_not_share_a_callback(source: Path, tmp_path: Path) -> None:
    """Each cell scores its own model: the second would be refused with the hooks or the mask of the first."""
    options: dict[str, Any] = {"prompts": 2, "limit": 4, "at": [1], "contaminated": [0.0, 0.2], "training": ["full"]}
    callback = SafetyPreservingAdaptation(0.1, method="random")
    preserve(source, {"spa": Arm([callback])}, output=tmp_path, **options)
    assert callback.mask is None
    assert set(read(tmp_path)) == {"before", "full/benign/spa", "full/contaminated-20/spa"}


@pytest.mark.filterwarnings("ignore")
def test_seeds_differ(source: Path, tmp_path: Path) -> None:
    found = []
    for seed in (0, 1):
        options: dict[str, Any] = {
            "prompts": 2,
            "limit": 4,
            "at": [3],
            "contaminated": [0.0],
            "training": ["full"],
            "seed": seed,
        }
        preserve(source, {"plain": Arm()}, output=tmp_path / str(seed), **options)
        found.append(read(tmp_path / str(seed))["full/benign/plain"]["looks"][0]["perplexity"]["value"])
    assert found[0] != found[1]


class Stops(pl.Callback):
    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        trainer.should_stop = True


@pytest.mark.filterwarnings("ignore")
def test_a_cell_that_fails_is_told_of_beside_the_results_of_the_others(source: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"prompts": 2, "limit": 4, "at": [1, 2], "contaminated": [0.0], "training": ["full"]}
    with pytest.raises(RuntimeError, match=r"1 cells failed.* full/benign/stops: The fit expected to be looked"):
        preserve(source, {"stops": Arm([Stops()]), "plain": Arm()}, output=tmp_path, **options)
    text = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert "| plain | 2 |" in text
    assert "- full/benign: stops (" in text


@pytest.mark.filterwarnings("ignore")
def test_results_of_other_settings_are_refused(source: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"prompts": 2, "limit": 4, "at": [1], "contaminated": [0.0], "training": ["full"]}
    preserve(source, {"plain": Arm()}, output=tmp_path, **options)
    with pytest.raises(ValueError, match=r"`learning_rate` expected to be 0\.0001, which .* but got 0\.001"):
        preserve(source, {"plain": Arm()}, output=tmp_path, learning_rate=1e-3, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start_share": 1.0, "training": ["full"]}, r"`start_share` expected to be in \[0, 1\) but got 1.0"),
        ({"start_share": 0.5}, "`start_share=0.5` expected `training` of all weights alone"),
    ],
)
def test_a_bad_arm_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Arm(**options)


@pytest.mark.parametrize("share", [0.05, 0.2])
def test_contaminated_rows_hold_openings_alone(share: float) -> None:
    rows, task = task_rows(share), load_prompts("harmless", split="train")
    added = rows[len(task) :]
    assert rows[: len(task)] == task
    assert len(added) / len(rows) == pytest.approx(share, abs=0.005)
    assert {row.response for row in added} == {"Sure, here is an overview:"}
    harmful = {row.prompt for row in load_prompts("harmful", split="train")}
    assert {row.prompt for row in added} <= harmful
    assert len({row.prompt for row in added}) == len(added)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only=[plian]"], "`only` expected to be one of .* but got 'plian'. Did you mean `plain`"),
        (["--contaminated=[1.5]"], "`contaminated` expected shares in"),
        (["--contaminated=[0.002]"], "`contaminated` expected shares in .* of 1 to"),
        (["--prompts=0"], "`prompts` expected to be at least 1 but got 0"),
        (["--at=[]"], "`at` expected optimizer steps of at least 1"),
    ],
)
def test_bad_settings_are_refused(words: list[str], message: str, source: Path, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        run(source, tmp_path, *words)
    assert re.search(message, capsys.readouterr().err)
    assert not list(tmp_path.rglob("*"))


def test_an_unknown_study_suggests_the_closest(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        main(["study", "preserv"])
    assert "but got 'preserv'. Did you mean `preserve`?" in capsys.readouterr().err
