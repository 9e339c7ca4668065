# SPDX-License-Identifier: Apache-2.0
"""The report of a tiny run in Chromium: on a phone and a desktop, by daylight and in the dark."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_safety.report import write_report
from tests.report.browser import MISSING, Browser, find_chromium, open_browser
from tests.report.folders import make_fit, make_study

PICTURES = """[...document.images].map(image => ({
  width: image.naturalWidth,
  shown: image.getBoundingClientRect().width,
  dark: image.currentSrc === image.parentElement.querySelector("source").srcset,
}))"""
# What sticks out of the window and lies in nothing that scrolls on its own.
SPILLED = """[...document.querySelectorAll("body *")].filter(one =>
  one.getBoundingClientRect().right > innerWidth + 1 && !one.closest(".scroll, pre")).map(one => one.outerHTML)"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = find_chromium()
    if program is None:
        # Where a browser can be had, not having one is no excuse; `.ci/run` knows whether it can.
        required = os.environ.get("REQUIRE_CHROMIUM", os.environ.get("CI", ""))
        (pytest.skip if required in ("", "0", "false") else pytest.fail)(MISSING)
    with open_browser(program, tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs side by side: the widest tables and the longest legends."""
    folder = tmp_path_factory.mktemp("runs")
    fit = make_fit(folder / "a-run-with-quite-a_long_name_that_breaks_nowhere_of_its_own", judges=("one", "two"))
    return write_report(fit, [make_study(folder / "study")])


@pytest.mark.parametrize("width", [375, 1200])
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_in_a_browser(browser: Browser, page: Path, width: int, dark: bool) -> None:
    browser.show(page, width=width, dark=dark)
    assert browser.complaints() == []
    assert [address for address in browser.requested() if not address.startswith("data:")] == [page.as_uri()]
    assert browser.value("innerWidth") == width
    assert browser.value("document.documentElement.scrollWidth") <= width
    browser.value("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert browser.value("document.documentElement.scrollWidth") <= width
    assert browser.value(SPILLED) == []
    pictures = browser.value(PICTURES)
    assert len(pictures) == page.read_text(encoding="utf-8").count("<img ") > 5
    assert all(one["width"] > 0 and one["shown"] > 200 and one["dark"] is dark for one in pictures)
    background = browser.value("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(18, 22, 25)" if dark else "rgb(246, 247, 248)")


def test_the_browser_would_have_complained(browser: Browser, tmp_path: Path, page: Path) -> None:
    """What the other test does not find, it could have found."""
    forbidden = (
        '<script>document.title = "ran"</script><img src="http://localhost:9/x.png"><p style="width:2000px">wide</p>'
    )
    spoilt = tmp_path / "spoilt.html"
    spoilt.write_text(page.read_text(encoding="utf-8").replace("<main>", f"<main>{forbidden}"), encoding="utf-8")
    # A picture that does not load cannot be decoded.
    with pytest.raises(AssertionError, match="EncodingError"):
        browser.show(spoilt, width=375, dark=False)
    assert browser.value("document.title") != "ran"
    assert browser.value("document.documentElement.scrollWidth") > 375
    assert any("Content Security Policy" in complaint for complaint in browser.complaints())
