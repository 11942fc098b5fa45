"""Pages for people: whole, escaped, readable without scripts, pictures or colours."""

from __future__ import annotations

from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from meiqa.errors import DecodeError
from meiqa.report import write_page
from meiqa.types import CulledPhoto, Culling, Failure, RankedPhoto, Ranking

Grey = Callable[..., Path]
NASTY = "<img src=x onerror=alert(1)> & \"quotes\" 'n'\nnew\udcff.png"


class Page(HTMLParser):
    """The elements and the text of a page; open elements must be closed in order."""

    VOID = ("meta", "img", "br")

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self._open: list[str] = []
        text = path.read_bytes().decode()
        self.feed(text)
        self.close()
        assert not self._open
        assert text.endswith("</html>\n")

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.words += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.elements if name == tag]


def write(path: Path, found: Ranking | Culling) -> None:
    with path.open("wb") as file:
        write_page(found, file)


def rank_page(path: Path, photos: list[RankedPhoto], failures: list[Failure]) -> Page:
    write(path, Ranking(tuple(photos), tuple(failures)))
    return Page(path)


def test_a_ranking_shows_everything(grey: Grey, tmp_path: Path) -> None:
    photo = str(grey("big.png"))
    Image.new("RGB", (900, 600), "teal").save(photo)
    ranked = RankedPhoto(1, photo, 4.31, 0.5, 4.2, 3, 2, "Sharp & bright.")
    page = rank_page(tmp_path / "r.html", [ranked], [Failure("x", DecodeError("x is broken"))])
    (image,) = page.all("img")
    assert image["src"]
    assert image["src"].startswith("data:image/jpeg;base64,")
    assert (image["width"], image["height"], image["alt"]) == ("240", "160", "big.png")
    for words in (
        *("4.31", "excellent", "95 % interval 3.33 to 5.00", "Sharp & bright.", "1. "),
        *("4.20 alone, compared with 3, 2 places up", "1 photo could not be judged", "x is broken"),
    ):
        assert words in page.words
    assert ("html", {"lang": "en"}) in page.elements
    assert len(page.all("h1")) == len(page.all("main")) == 1


def test_a_page_needs_nothing_else(grey: Grey, tmp_path: Path) -> None:
    page = rank_page(tmp_path / "r.html", [RankedPhoto(1, str(grey("a.png")), 3, 0, 3, 0, 0)], [])
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "iframe", "object"}
    addresses = [
        attrs[name] for _, attrs in page.elements for name in ("src", "href") if name in attrs
    ]
    assert all(address and address.startswith("data:") for address in addresses)
    text = (tmp_path / "r.html").read_text()
    assert "prefers-color-scheme: dark" in text
    assert "default-src 'none'" in text
    assert "http:" not in text
    assert "https:" not in text


@pytest.mark.parametrize("kind", ["rank", "cull"])
def test_names_and_texts_are_escaped(kind: str, tmp_path: Path) -> None:
    path, script = tmp_path / "r.html", "</p><script>alert(1)</script>"
    failures = (Failure(NASTY, DecodeError(f"{NASTY} {script}")),)
    if kind == "rank":
        photo = RankedPhoto(1, NASTY, 3.0, 0.2, 3.0, 0, 0, script)
        write(path, Ranking((photo,), failures))
    else:
        one = CulledPhoto(1, NASTY, 3.0, 0.2, 3.0, 1.0, script)
        other = CulledPhoto(2, NASTY, 2.0, 0.2, 2.0, 0.95, script)
        write(path, Culling(((one, other), (one,)), failures))
    page = Page(path)
    assert not page.all("script")
    assert not page.all("img")  # it can't be read, and its name makes none
    assert page.words.count(script) >= 2
    assert "<img src=x onerror=alert(1)> & \"quotes\" 'n'\\nnew\\udcff.png" in page.words
    assert "no picture" in page.words


def test_an_alternative_text_stays_in_its_quotes(grey: Grey, tmp_path: Path) -> None:
    photo = str(grey('a" onload="alert(1).png'))
    page = rank_page(tmp_path / "r.html", [RankedPhoto(1, photo, 3.0, 0.2, 3.0, 0, 0)], [])
    (image,) = page.all("img")
    assert image["alt"] == 'a" onload="alert(1).png'
    assert "onload" not in image


def test_groups_come_before_single_photos(grey: Grey, tmp_path: Path) -> None:
    names = [str(grey(f"{name}.png", level)) for name, level in (("a", 9), ("b", 99), ("c", 200))]
    first = (CulledPhoto(1, names[0], 4, 0.2, 3.9, 1.0), CulledPhoto(2, names[1], 3, 0.2, 3, 0.93))
    write(tmp_path / "c.html", Culling(((CulledPhoto(1, names[2], 5, 0.1, 5, 1.0),), first)))
    page = Page(tmp_path / "c.html")
    assert "2 photos in 1 group, and 1 without another like it" in page.words
    assert "Group 1: 2 shots" in page.words
    assert page.words.index("Group 1") < page.words.index("Single photos")
    assert page.words.count("best ") == 1 + page.words.count("the best ")
    assert "2 of 2, 3.00 alone, likeness 0.93" in page.words
    labelled = [attrs["aria-labelledby"] for attrs in page.all("section")]
    assert labelled == [attrs["id"] for attrs in page.all("h2")]


def test_what_was_left_out_is_told(tmp_path: Path) -> None:
    write(tmp_path / "r.html", Ranking((), (), ("pairs", "<text>")))
    assert "Left out for lack of time: pairs; <text>." in Page(tmp_path / "r.html").words
