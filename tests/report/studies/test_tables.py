# SPDX-License-Identifier: Apache-2.0
"""The tables and figures of the studies, from cells that are made up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lightning_safety.report.studies import WRITERS
from lightning_safety.report.studies.enhancement import draw_enhancement
from lightning_safety.report.studies.looks import read_look
from lightning_safety.report.studies.pattern import draw_pattern
from lightning_safety.report.studies.perturbation import draw_perturbation
from tests.report.studies.made_up import look, results


def rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]


def test_perturbation(tmp_path: Path) -> None:
    places = {"top/0.01": look(40), "random/0.01": look(6, 21.0), "random/0.05": look(9, 40.0)}
    found = {"before": look(5), **{f"0.38/{name}": one for name, one in places.items()}, "0.1/top/0.01": look(7)}
    text = WRITERS["perturb"](results(found, **{"0.38/bottom/0.01": 1800.0}), tmp_path)
    strong, weak = text.split("### Noise of ")[1:]
    assert strong.startswith("0.38 standard deviations")
    table = rows(strong)
    assert [row[:2] for row in table[1:]] == [["before", ""], ["top", "1 %"], ["random", "1 %"], ["random", "5 %"]]
    assert table[2][2] == "0.80 [0.67, 0.89] n=50"
    assert table[2][-1] == "0.10 [0.05, 0.20] n=60"
    assert [row[0] for row in rows(weak)[1:]] == ["before", "top"]
    assert "- 0.38/bottom: 0.01 (0.50 h)" in text
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["noise-0.1.png", "noise-0.38.png"]
    figure = draw_perturbation({name: read_look(one) for name, one in places.items()}, read_look(found["before"]))
    attacks, answers = figure.axes
    curves = {container.get_label(): container.lines[0] for container in attacks.containers}
    assert list(curves) == ["top", "random"]
    assert curves["random"].get_ydata().tolist() == [6 / 50, 9 / 50]
    assert curves["random"].get_markerfacecolor() == "white"
    assert answers.lines[1].get_ydata().tolist() == [21.0, 40.0]


def test_enhancement(tmp_path: Path) -> None:
    found = {
        "before": {"looks": [look(49, step=0)]},
        "seed-0/top": {"looks": [look(20, step=50), look(5, step=100)]},
        "seed-0/random": {"looks": [look(30, step=50), look(10, step=100)]},
        "seed-1/top": {"looks": [look(4, step=100)]},
    }
    text = WRITERS["enhance"](results(found), tmp_path)
    assert [row[:2] for row in rows(text.split("### seed 1")[0])[1:]] == [
        ["before", "0"],
        ["top", "50"],
        ["top", "100"],
        ["random", "50"],
        ["random", "100"],
    ]
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["front-seed-0.png", "front-seed-1.png"]
    arms = {"random": [(step["step"], read_look(step)) for step in found["seed-0/random"]["looks"]]}
    words, classifier = draw_enhancement(arms, None).axes
    (line,) = words.lines
    assert line.get_xdata().tolist() == [0.04, 0.04]
    assert line.get_ydata().tolist() == [0.6, 0.2]
    assert line.get_markerfacecolor() == "white"
    assert classifier.lines[0].get_ydata().tolist() == [31 / 50, 11 / 50]


def group(name: str, enrichment: float, resampled: list[float]) -> dict[str, Any]:
    return {"group": name, "weights": 1000, "selected": 10, "enrichment": enrichment, "resampled": resampled}


def test_pattern(tmp_path: Path) -> None:
    found = {
        "before": {
            "prompts": 60,
            "scored": 2000,
            "selected": 20,
            "components": [group("q", 0.5, [0.4, 0.6]), group("v", 4.0, [3.0, 5.0])],
            "layers": [group("0", 1.0, [1.0, 1.0])],
            "jaccard": [0.4, 0.6],
        }
    }
    text = WRITERS["pattern"](results(found), tmp_path)
    assert "### Enrichment of the top 1 % by component" in text
    # 1.96 standard deviations of the resamples, and never below nothing.
    assert ["v", "1,000", "4.00 [1.23, 6.77]"] in rows(text)
    assert ["q", "1,000", "0.50 [0.22, 0.78]"] in rows(text)
    assert ["before", "60", "2", "0.500", "0.400", "0.0050"] in rows(text)
    by_component, by_layer = draw_pattern(found).axes
    assert [bar.get_height() for bar in by_component.patches] == [0.5, 4.0]
    assert [label.get_text() for label in by_layer.get_xticklabels()] == ["0"]


def test_activations(tmp_path: Path) -> None:
    names = ("overlap", "overlap_centred")
    layer: dict[str, Any] = {
        f"{name}{suffix}": value
        for name in names
        for suffix, value in (("", 0.9), ("_shuffled", 0.8), ("_random", 0.1))
    }
    layer |= {"separability": 0.99, "separability_chance": 0.5}
    undefined = dict.fromkeys(layer)
    found = {
        "harmless/before": {"prompts": [110, 100], "layers": {"0": undefined, "1": layer}},
        "harmless/after": {"prompts": [110, 100], "layers": {"0": undefined, "1": layer}},
        "borderline/before": {"prompts": [110, 130], "layers": {"1": layer}},
    }
    text = WRITERS["activations"](results(found), tmp_path)
    table = rows(text)
    assert table[1] == ["before", "110 + 100", "0.900", "0.800", "0.100", "0.900", "0.800", "0.100", "0.990", "0.500"]
    assert "### Harmful against borderline prompts: means over 1 hidden states" in text
    assert sorted(path.name for path in tmp_path.glob("*.png")) == [
        "activations-borderline.png",
        "activations-harmless.png",
    ]


def test_subspaces(tmp_path: Path) -> None:
    found = {
        "aligned": look(5),
        "useful/whole": look(30, 18.0),
        "useful/top-parallel-0.5": look(8, 19.0, energy_kept=0.25, capped=3, matrices=9),
        "useful/top-parallel-0.01": look(6, 19.5, energy_kept=0.05, capped=1, matrices=9),
        "useful/random_own-orthogonal-0.5": look(29, 18.5, energy_kept=0.75, capped=3, matrices=9),
        "overlaps": {"pairs": {"useful | harmful": [{"energy": 0.5, "overlap": 0.2, "overlap_random": 0.1}]}},
    }
    text = WRITERS["subspaces"](results(found), tmp_path)
    assert [row[:4] for row in rows(text)[1:6]] == [
        ["aligned, no update", "", "", "–"],
        ["whole update", "", "", "1.000"],
        ["parallel, top", "0.5", "3 of 9", "0.250"],
        ["parallel, top", "0.01", "1 of 9", "0.050"],
        ["orthogonal, random_own", "0.5", "3 of 9", "0.750"],
    ]
    assert rows(text)[-1] == ["useful and harmful", "0.200 (0.100)"]
    assert [path.name for path in tmp_path.glob("*.png")] == ["projected-useful.png"]


@pytest.mark.parametrize("study", WRITERS)
def test_a_study_without_cells_says_what_is_missing(study: str, tmp_path: Path) -> None:
    assert WRITERS[study](results({}, **{"a/b": 3600.0}), tmp_path).endswith("- a: b (1.00 h)\n")
