# SPDX-License-Identifier: Apache-2.0
"""Reading a page as a browser would: its tags, their attributes, and what it says."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser

# HTML elements without an end.
_BLOCKS = {"p", "li", "dt", "dd", "div", "h1", "h2", "h3", "h4", "td", "th", "summary", "blockquote"}
_EMPTY = {"meta", "img", "source", "br", "hr", "link", "input", "line", "circle"}


@dataclass
class Tag:
    name: str
    attributes: dict[str, str]
    inside: tuple[str, ...]
    text: str = ""


@dataclass
class Page(HTMLParser):
    """Every tag in order, with the text below it."""

    html: str
    tags: list[Tag] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._open: list[Tag] = []
        self.feed(self.html)
        self.close()
        assert not self._open, [tag.name for tag in self._open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = Tag(tag, {name: value or "" for name, value in attrs}, tuple(one.name for one in self._open))
        self.tags.append(found)
        if tag not in _EMPTY:
            self._open.append(found)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop().name == tag
        if tag in _BLOCKS:
            self.handle_data(" ")

    def handle_data(self, data: str) -> None:
        for tag in self._open:
            tag.text += data

    def all(self, name: str) -> list[Tag]:
        return [tag for tag in self.tags if tag.name == name]

    def one(self, name: str) -> Tag:
        (tag,) = self.all(name)
        return tag

    @property
    def text(self) -> str:
        """What the page says, its spaces and line breaks evened."""
        return " ".join(self.one("body").text.split())

    def table(self, title: str) -> list[list[str]]:
        """The rows of the table whose heading begins so."""
        start = next(place for place, tag in enumerate(self.tags) if tag.name == "h3" and tag.text.startswith(title))
        end = next(place for place, tag in enumerate(self.tags) if place > start and tag.name == "table")
        rows: list[list[str]] = []
        for tag in self.tags[end + 1 :]:
            if "table" not in tag.inside:
                break
            if tag.name == "tr":
                rows.append([])
            elif tag.name in ("th", "td"):
                rows[-1].append(" ".join(tag.text.split()))
        return rows


def assert_needs_nothing_else(page: Page) -> None:
    """Make sure that the page holds no script and names nothing outside of it."""
    allowed = (
        "html head meta title style body header main footer section h1 h2 h3 h4 p ul li dl dt dd div span b i code"
    )
    allowed += " table thead tbody tr th td figure picture source img svg line circle details summary blockquote pre"
    assert {tag.name for tag in page.tags} <= set(allowed.split())
    for tag in page.tags:
        for name, value in tag.attributes.items():
            assert not name.startswith("on")
            assert "//" not in value or value.startswith("data:image/png;base64,"), (tag.name, name, value[:80])
            assert "javascript:" not in value
    styles = "".join(tag.text for tag in page.all("style"))
    assert "url(" not in styles
    assert "@import" not in styles
    policies = [tag.attributes["content"] for tag in page.all("meta") if "http-equiv" in tag.attributes]
    assert len(policies) == 1
    assert policies[0].startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline';")
    assert not any(ord(character) < 0x20 and character != "\n" for character in page.html)
