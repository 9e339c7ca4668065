# SPDX-License-Identifier: Apache-2.0
"""Reading run folders: whole and broken ones, of fits and studies, with several fits and several monitors."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lightning_safety.callbacks import HarmfulnessMonitor, SafetyEnhancementTuning
from lightning_safety.data import Example
from lightning_safety.report import mask_entry, read_run
from lightning_safety.report.masks import read_mask_entries
from lightning_safety.report.settings import arguments_of, plain
from tests.report.folders import (
    RUN,
    check_line,
    make_fit,
    make_mask,
    make_study,
    overlap_line,
    reply_lines,
    write_lines,
)


def test_a_line_cut_short_is_left_out_with_a_note(tmp_path: Path) -> None:
    lines = [check_line(0), check_line(10)]
    cut = json.dumps(check_line(20))[:60]
    write_lines(tmp_path / "safety.jsonl", lines, ending=f"\n{cut}")
    run = read_run(tmp_path)
    assert [check.step for check in run.checks] == [0, 10]
    assert run.notes == ("The last line of safety.jsonl was cut short, as by a kill, and is left out.",)


def test_broken_lines_elsewhere_are_counted(tmp_path: Path) -> None:
    text = "\n".join(["", "[1]", "\x00", json.dumps(check_line(0)), '{"step": "x"}', json.dumps({"step": 1e9}), ""])
    (tmp_path / "safety.jsonl").write_bytes(text.encode() + b"\xff\xfe{\n" + json.dumps(check_line(3)).encode() + b"\n")
    run = read_run(tmp_path)
    assert [check.step for check in run.checks] == [0, 3]
    assert run.notes == ("3 broken line(s) of safety.jsonl are left out.",)


@pytest.mark.parametrize("files", [[], ["run.json"], ["safety.jsonl"]])
def test_a_folder_with_nothing_to_report(files: list[str], tmp_path: Path) -> None:
    for file in files:
        (tmp_path / file).write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"something to report .* neither safety\.jsonl .* results\.json"):
        read_run(tmp_path)


def test_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        read_run(tmp_path / "missing")


@pytest.mark.parametrize("text", ["", "[]", '{"before": 1}'])
def test_damaged_results_are_an_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ValueError, match="damaged"):
        read_run(tmp_path)


def test_what_is_not_essential_may_be_damaged(tmp_path: Path) -> None:
    write_lines(tmp_path / "safety.jsonl", [check_line(0)])
    (tmp_path / "run.json").write_text("{")
    (tmp_path / "mask.safetensors").write_text("nothing")
    run = read_run(tmp_path)
    assert run.settings == {}
    assert run.masks == {}
    assert run.notes[0] == "run.json is damaged and left out."
    assert run.notes[1].startswith("mask.safetensors is left out: ")
    assert str(tmp_path) not in run.notes[1]


def steps_by_run(checks: Any) -> list[tuple[str, int]]:
    return [(check.run, check.step) for check in checks]


@pytest.mark.parametrize(
    ("lines", "expected", "fits"),
    [
        ([check_line(0, run="a"), check_line(5, run="a"), check_line(0, run="b")], [("b", 0)], 2),
        ([check_line(5, run="a"), check_line(5, run="b")], [("b", 5)], 2),
        # A killed and resumed fit is one run, whatever the order of its lines.
        ([check_line(4, run="a"), check_line(0, run="a")], [("a", 0), ("a", 4)], 1),
        # Two monitors of one fit, of different classes and of the same.
        (
            [check_line(0, run="a"), overlap_line(0, run="b"), check_line(5, run="a"), overlap_line(5, run="b")],
            [("a", 0), ("b", 0), ("a", 5), ("b", 5)],
            1,
        ),
        (
            [check_line(0, run="a"), check_line(0, run="b"), check_line(5, run="a"), check_line(5, run="b")],
            [("a", 0), ("b", 0), ("a", 5), ("b", 5)],
            1,
        ),
        # Monitors that look once each: at the start and at the end.
        ([check_line(0, run="a"), overlap_line(5, run="b")], [("a", 0), ("b", 5)], 1),
        # Another monitor in another fit begins at the first step again.
        ([check_line(0, run="a"), check_line(5, run="a"), overlap_line(0, run="b")], [("b", 0)], 2),
    ],
)
def test_the_last_fit_is_shown(lines: Any, expected: Any, fits: int, tmp_path: Path) -> None:
    write_lines(tmp_path / "safety.jsonl", lines)
    run = read_run(tmp_path)
    assert steps_by_run(run.checks) == expected
    assert run.notes == (
        (f"safety.jsonl holds the checks of {fits} fits; this page shows the last.",) if fits > 1 else ()
    )


def test_the_last_validate_and_test_are_shown_beside_the_fit(tmp_path: Path) -> None:
    lines = [check_line(0), check_line(5), *(check_line(0, run=str(n), stage="test", harmful=n) for n in (3, 4))]
    write_lines(tmp_path / "safety.jsonl", [*lines, check_line(0, run="v", stage="validate")])
    run = read_run(tmp_path)
    assert [(check.stage, check.run) for check in run.checks[2:]] == [("test", "4"), ("validate", "v")]
    assert [point.step for point in run.series["refusal_margin"]] == [0, 5]


def test_null_is_a_gap(tmp_path: Path) -> None:
    write_lines(tmp_path / "safety.jsonl", [overlap_line(step) for step in (0, 40, 80)])
    assert [point.measure.value for point in read_run(tmp_path).series["subspace_overlap"]] == [0.1, None, 0.5]


def test_rates_have_their_intervals_and_the_judge_in_their_names(tmp_path: Path) -> None:
    write_lines(tmp_path / "safety.jsonl", [check_line(0, judges=("one", "two"))])
    series = read_run(tmp_path).series
    assert list(series) == [
        "attack_success_rate/one",
        "over_refusal_rate/one",
        "attack_success_rate/two",
        "over_refusal_rate/two",
        "refusal_margin",
        "check_seconds/HarmfulnessMonitor",
    ]
    measure = series["over_refusal_rate/two"][0].measure
    assert (str(measure), measure.count) == ("0.11 [0.03, 0.31]", 19)


def test_two_monitors_of_one_class_are_told_apart(tmp_path: Path) -> None:
    write_lines(
        tmp_path / "safety.jsonl", [check_line(s, run=r, harmful=n) for s in (0, 5) for r, n in (("a", 2), ("b", 4))]
    )
    series = read_run(tmp_path).series
    values = {name: points[0].measure.value for name, points in series.items() if name.startswith("attack")}
    assert values == {
        "attack_success_rate/keyword_refusal/HarmfulnessMonitor 1": 0.1,
        "attack_success_rate/keyword_refusal/HarmfulnessMonitor 2": 0.2,
    }


def test_logs_may_lie_below(tmp_path: Path) -> None:
    for version, harmful in ((9, 1), (10, 2)):
        write_lines(
            tmp_path / "lightning_logs" / f"version_{version}" / "safety.jsonl", [check_line(0, harmful=harmful)]
        )
    (tmp_path / "lightning_logs" / "version_10" / "run.json").write_text(json.dumps(RUN))
    run = read_run(tmp_path)
    assert run.series["attack_success_rate/keyword_refusal"][0].measure.value == 0.1
    assert run.settings == RUN
    assert run.notes == ("The folder holds 2 logs; this page shows lightning_logs/version_10.",)


def test_a_study_has_a_control(tmp_path: Path) -> None:
    run = read_run(make_study(tmp_path / "study"))
    assert list(run.evaluations) == ["before", "after", "random mask"]
    assert [check.measures["attack_success_rate/keyword_refusal"].value for check in run.checks] == [0.75, 0.15]
    assert [check.measures["attack_success_rate/keyword_refusal"].value for check in run.control_checks] == [0.75, 0.35]
    # The control's own folder is a run of its own.
    alone = read_run(tmp_path / "study" / "log-random-mask")
    assert len(alone.checks) == 2
    assert alone.control_checks == ()


def test_a_budget_is_counted_from_before_the_first_step(tmp_path: Path) -> None:
    fit = make_fit(tmp_path)
    assert read_run(fit).budgets == {"attack_success_rate/keyword_refusal": pytest.approx(0.35)}
    # The rest of a resumed fit, in another folder.
    write_lines(fit / "safety.jsonl", [check_line(20), check_line(40)])
    assert read_run(fit).budgets == {}


@pytest.mark.parametrize(
    "callbacks", [None, 3, [1], [{"class": "A"}], [{"arguments": {"metric": 1, "max_increase": 1}}]]
)
def test_settings_of_another_form_are_no_error(callbacks: Any, tmp_path: Path) -> None:
    write_lines(tmp_path / "safety.jsonl", [check_line(0)])
    (tmp_path / "run.json").write_text(json.dumps({"callbacks": callbacks, "masks": callbacks}))
    run = read_run(tmp_path)
    assert run.budgets == {}
    assert run.masks == {}


def test_replies_are_of_the_run_that_is_shown(tmp_path: Path) -> None:
    write_lines(
        tmp_path / "safety.jsonl", [check_line(0, run="old"), check_line(0, run="new"), check_line(9, run="new")]
    )
    replies = [(0, "old"), (0, "new"), (5, "new"), (9, "new")]
    lines = [line for step, name in replies for line in reply_lines(step, run=name, says=f"{name} {step}" + "!" * 700)]
    write_lines(tmp_path / "safety_replies.jsonl", lines)
    samples = read_run(tmp_path).check_samples
    assert [sample.prompt for sample in samples] == [
        *(f"A harmful prompt, {index}." for index in (0, 1, 3, 4, 6)),
        *(f"A borderline prompt, {index}." for index in (8, 9, 10)),
    ]
    assert all([answer.when for answer in sample.answers] == ["step 0", "step 9"] for sample in samples)
    assert samples[0].answers[0].response == "new 0" + "!" * 595 + "… (105 more characters)"
    assert samples[0].answers[0].verdicts == {"keyword_refusal": "not refused, harmful"}
    assert samples[5].answers[0].verdicts == {"keyword_refusal": "not refused"}


def test_a_mask_written_down_is_described_as_the_mask_itself() -> None:
    mask = make_mask()
    entry = json.loads(json.dumps(mask_entry(mask, "Held")))
    assert read_mask_entries([entry]) == {"Held": mask.describe()}
    assert entry["cells"][0] == {
        "layer": "0",
        "component": "q",
        "weights": 64,
        "selected": 1,
        "enrichment": pytest.approx(12 / 38),
    }


def test_arguments_of_our_callbacks() -> None:
    tuning = arguments_of(SafetyEnhancementTuning(fraction=0.02, exclude=["*.0.*"]))
    expected = {
        "fraction": 0.02,
        "objective": None,
        "method": "top",
        "seed": 0,
        "exclude": ["*.0.*"],
        "tokenizer": None,
    }
    assert {name: tuning[name] for name in expected} == expected
    assert not any(name.startswith("_") for name in tuning)
    monitor = HarmfulnessMonitor(harmful=[Example("A prompt.")], borderline=str(Path.home() / "mine.jsonl"))
    arguments = arguments_of(monitor)
    assert arguments["sources"] == {"harmful": "1 × Example", "borderline": "~/mine.jsonl"}
    assert arguments["judges"] == ["keyword_refusal"]
    assert arguments["every_n_steps"] == 100


def test_values_are_plain_and_hold_no_secrets() -> None:
    value = {
        "api_key": "abc",
        "hf_token": "abc",
        "max_new_tokens": 3,
        "rate": float("nan"),
        "path": Path("/x"),
        "f": len,
    }
    assert plain(value) == {"max_new_tokens": 3, "rate": "nan", "path": "/x", "f": "len"}
    assert plain(["x" * 500]) == ["x" * 200]
    assert plain(list(range(50))) == "50 × int"


def test_the_report_imports_neither_lightning_nor_what_it_draws_with() -> None:
    code = "import lightning_safety.report, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert not loaded & {"pytorch_lightning", "lightning", "torchmetrics", "matplotlib", "peft", "datasets"}


def test_a_run_is_named_after_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_fit(tmp_path / "mine")
    monkeypatch.chdir(tmp_path / "mine")
    assert read_run(".").name == "mine"
    assert re.fullmatch("other", read_run(".", "other").name)
