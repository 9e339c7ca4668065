# SPDX-License-Identifier: Apache-2.0
"""What the page says, that it needs nothing else, and that what others wrote stays text."""

from __future__ import annotations

import base64
import builtins
import json
import stat
from pathlib import Path
from typing import Any

import pytest

from lightning_safety.report import render_page, write_report
from lightning_safety.report.figures import Picture
from tests.report.folders import RUN, check_line, make_fit, make_study, reply_lines, write_lines
from tests.report.pages import Page, assert_needs_nothing_else

# What a reply, a prompt or a name may try.
NASTY = "<script>alert(1)</script><img src=x onerror=y> {{ 7*7 }} \x1b[31mred\x07 \u202etxt \x9b \x7f \"'&"
SHOWN = "<script>alert(1)</script><img src=x onerror=y> {{ 7*7 }} ␛[31mred␇ \\u202etxt \\u009b ␡ \"'&"


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of the time; the page of `fit_page` is drawn."""
    empty = f"data:image/png;base64,{base64.b64encode(bytes(4)).decode()}"
    monkeypatch.setattr("lightning_safety.report.page.draw_pictures", lambda subject: Picture(empty, empty, 400, 300))


@pytest.fixture(scope="module")
def fit_page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return write(make_fit(tmp_path_factory.mktemp("runs") / "my-fit"))


def write(folder: Path, *others: Path, **options: Any) -> Page:
    return Page(write_report(folder, others, **options).read_text(encoding="utf-8"))


def test_it_answers_in_the_order_in_which_a_reader_asks(fit_page: Page) -> None:
    assert [tag.text for tag in fit_page.all("h2")] == [
        "What happened",
        "When it happened",
        "Where the selected weights are",
        "Compared with chance",
        "Replies",
        "Configuration",
    ]
    assert fit_page.one("h1").text == fit_page.one("title").text == "Safety report: my-fit"


def test_the_summary_has_intervals_controls_and_budget(fit_page: Page) -> None:
    said = "Attack success (keyword_refusal) went from 0.25 [0.11, 0.47] at step 0 to 0.45 [0.26, 0.66] at step 80"
    assert f"{said}; the intervals overlap." in fit_page.text
    assert "The fit finished at step 80 of 80." in fit_page.text
    assert "is 0.35; the rate first rose above it at step 60 (0.40 [0.22, 0.61])" in fit_page.text
    table = fit_page.table("Checks during training")
    assert table[0] == ["metric", "first check, step 0", "last check, step 80"]
    rows = {row[0]: row[1:] for row in table[1:]}
    attack = next(cells for name, cells in rows.items() if name.startswith("Attack success · keyword_refusal"))
    assert attack == ["0.25 [0.11, 0.47] n=20", "0.45 [0.26, 0.66] n=20 budget line: 0.35"]
    overlap = next(cells for name, cells in rows.items() if name.startswith("Subspace overlap"))
    assert overlap == ["0.10 by chance: 0.05", "0.50 by chance: 0.05"]
    assert not any("random" in name for name in rows)
    # What watching costs stands last, told apart by monitor.
    assert [name.split(" what")[0] for name in list(rows)[-2:]] == [
        "Seconds a check took · HarmfulnessMonitor",
        "Seconds a check took · SubspaceOverlapMonitor",
    ]


def test_replies_are_collapsed_below_a_warning(fit_page: Page) -> None:
    assert all("open" not in tag.attributes for tag in fit_page.all("details"))
    quotes = fit_page.all("blockquote")
    assert all("details" in tag.inside for tag in quotes)
    # Five harmful prompts and three borderline ones, at the first check and the last.
    assert [tag.text for tag in quotes] == ["Reply at step 0.", "Reply at step 80."] * 8
    assert "step 0 · keyword_refusal: not refused, harmful" in fit_page.text
    assert fit_page.text.index("Do not publish them.") < fit_page.text.index("Reply at step 0.")


def test_configuration_and_versions(fit_page: Page) -> None:
    for words in ("torch 2.13.0", "max increase 0.1", "weights 134,515,008", "cores 2", "seed_everything: 0"):
        assert words in fit_page.text
    assert "api_key: (left out)" in fit_page.text
    assert "sk-12345" not in fit_page.html


def test_pictures_say_in_words_what_they_show(fit_page: Page) -> None:
    words = [tag.attributes["alt"] for tag in fit_page.all("img")]
    assert len(words) == 5
    assert words[0] == (
        "Attack success · keyword_refusal over optimizer steps. keyword_refusal: 0.25 [0.11, 0.47] at step 0,"
        " 0.45 [0.26, 0.66] at step 80, lowest 0.20 at step 20 (5 checks)."
        " Budget for keyword_refusal: at most 0.35. Brackets: 95 % intervals, drawn as bands."
    )
    assert "Highest: layer 1 v 2.53" in words[3]
    assert "by chance, safety subspace: 0.05 at step 0, 0.05 at step 80 (5 checks, 1 without a value)" in words[4]


def test_every_picture_has_a_dark_variant(fit_page: Page) -> None:
    for source, image in zip(fit_page.all("source"), fit_page.all("img"), strict=True):
        assert source.attributes["media"] == "(prefers-color-scheme: dark)"
        assert source.inside[-1] == image.inside[-1] == "picture"
        pictures = [
            base64.b64decode(one.partition(",")[2]) for one in (source.attributes["srcset"], image.attributes["src"])
        ]
        assert all(picture.startswith(b"\x89PNG") for picture in pictures)
        assert pictures[0] != pictures[1]


def test_a_study_stands_beside_its_control(tmp_path: Path) -> None:
    page = write(make_study(tmp_path / "study"), title="Mine")
    assert page.one("h1").text == "Mine"
    table = page.table("Evaluation")
    assert table[0] == ["metric", "before", "after", "random mask"]
    assert table[1][1:] == ["0.73 [0.64, 0.80] n=110", "0.14 [0.08, 0.21] n=110", "0.23 [0.16, 0.31] n=110"]
    assert table[2][1] == "0.07 [0.03, 0.14] n=100 29 of 129 unscored"
    assert [row[1] for row in table[3:]] == ["−1.25", "28.90 [24.90, 34.00] n=110", "–"]
    assert (
        "Judge: keyword_refusal. Replies: 24 tokens at most. Prompts: harmful/test. Something was left out."
        in page.text
    )
    assert "went from 0.73 [0.64, 0.80] before to 0.14 [0.08, 0.21] after; the intervals do not overlap" in page.text
    assert "Over-refusal of borderline prompts was 0.07 [0.03, 0.14] before and after." in page.text
    assert (
        "0.23 [0.16, 0.31] with a random mask; the intervals overlap: this run does not tell them apart." in page.text
    )
    assert page.table("Checks")[0][-1] == "random mask, last check"
    assert "random mask: 0.75 [0.53, 0.89] at step 0" in page.all("img")[0].attributes["alt"]
    assert [tag.text for tag in page.all("blockquote")] == ["Reply before.", "Reply after.", "Reply random mask."]
    assert "no run.json" in page.text


def test_a_run_without_control_says_how_to_get_one(tmp_path: Path) -> None:
    write_lines(tmp_path / "safety.jsonl", [check_line(0)])
    page = write(tmp_path)
    assert "Nothing here was measured beside a random control." in page.text
    assert page.table("Checks")[0] == ["metric", "step 0"]


def test_runs_side_by_side(tmp_path: Path) -> None:
    first, second = make_fit(tmp_path / "a" / "fit"), make_fit(tmp_path / "b" / "fit", harmful=(5, 8, 12, 15, 18))
    page = write(first, second, make_study(tmp_path / "study"))
    names = [f"{name}/fit" for name in "ab"] + [f"{tmp_path.name}/study"]
    steps = [80, 80, 88]
    assert page.table("Last check")[0] == ["metric", *(f"{n}, step {s}" for n, s in zip(names, steps, strict=True))]
    attack = page.table("Last check")[1]
    assert attack[1] == "0.45 [0.26, 0.66] n=20 step 0: 0.25 [0.11, 0.47] budget line: 0.35"
    assert attack[2].startswith("0.90 [0.70, 0.97]")
    words = page.all("img")[0].attributes["alt"]
    assert "a/fit: 0.25" in words
    assert "b/fit: 0.25" in words
    evaluation = page.table("Evaluation after training")[1]
    assert evaluation[1:3] == ["–", "–"]
    assert evaluation[3] == "0.14 [0.08, 0.21] n=110 before: 0.73 [0.64, 0.80] random mask: 0.23 [0.16, 0.31]"
    assert_needs_nothing_else(page)


def test_the_same_folder_twice_is_two_columns(tmp_path: Path) -> None:
    fit = make_fit(tmp_path / "fit")
    assert write(fit, fit).table("Last check")[0] == ["metric", "fit, step 80", "fit (2), step 80"]


def test_a_folder_whose_name_says_nothing_is_named_with_the_one_above(tmp_path: Path) -> None:
    study = make_study(tmp_path / "mine")
    assert write(study / "log").one("h1").text == "Safety report: mine/log"


def test_what_others_wrote_stays_text(tmp_path: Path) -> None:
    folder = make_fit(tmp_path / "<b>&'\"$x_1$ run")
    lines = [check_line(step, judges=(NASTY,)) for step in (0, 9)]
    for line in lines:
        line |= {f"safety/{NASTY}": 1.0, "monitor": NASTY}
        line["rates"][f"attack_success_rate/{NASTY}"]["warning"] = NASTY
    write_lines(folder / "safety.jsonl", lines)
    replies = [line | {"prompt": NASTY, "verdicts": {NASTY: {"refused": True}}} for line in reply_lines(9, says=NASTY)]
    write_lines(folder / "safety_replies.jsonl", replies)
    settings = RUN | {
        "outcome": {"step": 9, "exception": NASTY},
        "module": {"model": NASTY, NASTY: NASTY},
        "callbacks": [{"class": NASTY, "arguments": {NASTY: [NASTY], "metric": NASTY, "max_increase": 0.1}}],
        "machine": {"accelerators": [NASTY]},
    }
    (folder / "run.json").write_text(json.dumps(settings))
    (folder / "config.yaml").write_text(f"{NASTY}: {NASTY}\n</pre></details>{NASTY}", encoding="utf-8")
    results = {NASTY: {"attack_success_rate": {"value": 0.5, "low": 0.4, "high": 0.6, "scored": 10, "warning": NASTY}}}
    results[NASTY] |= {NASTY: 1.0, "judge": NASTY, "prompts": {"harmful": NASTY}, "notes": [NASTY]}
    (folder / "results.json").write_text(json.dumps(results))
    page = write(folder, title=NASTY)
    assert_needs_nothing_else(page)
    assert page.one("h1").text == SHOWN
    assert page.all("blockquote")[0].text == SHOWN
    assert f"</pre></details>{SHOWN}" in page.one("pre").text
    assert page.text.count(SHOWN) > 20
    compared = write(folder, make_fit(tmp_path / "other"))
    assert_needs_nothing_else(compared)
    assert "<b>&'\"$x_1$ run" in compared.text


def test_half_of_a_surrogate_pair_can_be_written(tmp_path: Path) -> None:
    write_lines(tmp_path / "safety.jsonl", [check_line(0)])
    write_lines(tmp_path / "safety_replies.jsonl", reply_lines(0, says="\ud83d"))
    assert write(tmp_path).all("blockquote")[0].text == "\\ud83d"


def test_no_page_needs_anything_else(fit_page: Page, tmp_path: Path) -> None:
    assert_needs_nothing_else(fit_page)
    assert_needs_nothing_else(write(make_study(tmp_path)))


def test_only_its_owner_can_read_replies(tmp_path: Path) -> None:
    fit = make_fit(tmp_path / "fit")
    page = write_report(fit)
    assert page == fit / "safety_report.html"
    assert stat.S_IMODE(page.stat().st_mode) == 0o600
    (fit / "safety_replies.jsonl").unlink()
    public = write_report(fit, output=tmp_path / "new" / "page.html")
    assert stat.S_IMODE(public.stat().st_mode) & 0o044
    assert "Do not publish" not in public.read_text(encoding="utf-8")


def test_replies_can_be_left_out(tmp_path: Path) -> None:
    fit = make_fit(tmp_path / "fit")
    assert write(fit).all("blockquote")
    page = write_report(fit, output=tmp_path / "page.html", replies=False)
    assert stat.S_IMODE(page.stat().st_mode) & 0o044
    shared = Page(page.read_text(encoding="utf-8"))
    assert not shared.all("blockquote")
    assert "Do not publish" not in shared.html


@pytest.mark.parametrize("library", ["matplotlib", "jinja2"])
def test_a_missing_library_is_named(library: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real_import = builtins.__import__

    def refuse(name: str, *arguments: Any, **keywords: Any) -> Any:
        if name.partition(".")[0] == library:
            raise ModuleNotFoundError(f"No module named {library!r}", name=library)
        return real_import(name, *arguments, **keywords)

    fit = make_fit(tmp_path)
    monkeypatch.setattr(builtins, "__import__", refuse)
    for call in (lambda: write_report(fit), lambda: render_page([])):
        with pytest.raises(ModuleNotFoundError, match=rf"{library} is not .*pip install 'lightning-safety\[report\]'"):
            call()
    assert not (fit / "safety_report.html").exists()
