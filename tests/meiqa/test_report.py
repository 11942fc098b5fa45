"""Pages for people: whole, escaped, readable without scripts, pictures or colours."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from meiqa import cli
from meiqa.errors import DecodeError, OutputUnwritable
from meiqa.report import open_report
from meiqa.types import CulledPhoto, Culling, Failure, RankedPhoto, Ranking

Grey = Callable[..., Path]
Output = pytest.CaptureFixture[str]
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


def rank_page(path: Path, photos: list[RankedPhoto], failures: list[Failure]) -> Page:
    with open_report(path) as report:
        report.write_ranking(Ranking(tuple(photos), tuple(failures)))
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
    with open_report(path) as report:
        if kind == "rank":
            photo = RankedPhoto(1, NASTY, 3.0, 0.2, 3.0, 0, 0, script)
            report.write_ranking(Ranking((photo,), failures))
        else:
            one = CulledPhoto(1, NASTY, 3.0, 0.2, 3.0, 1.0, script)
            other = CulledPhoto(2, NASTY, 2.0, 0.2, 2.0, 0.95, script)
            report.write_culling(Culling(((one, other), (one,)), failures))
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
    with open_report(tmp_path / "c.html") as report:
        report.write_culling(Culling(((CulledPhoto(1, names[2], 5, 0.1, 5, 1.0),), first)))
    page = Page(tmp_path / "c.html")
    assert (
        "2 photos in 1 group of near-identical shots, and 1 without another like it" in page.words
    )
    assert "Group 1: 2 shots" in page.words
    assert page.words.index("Group 1") < page.words.index("Single photos")
    assert page.words.count("best ") == 1 + page.words.count("the best ")
    assert "likeness to the best 0.93" in page.words
    labelled = [attrs["aria-labelledby"] for attrs in page.all("section")]
    assert labelled == [attrs["id"] for attrs in page.all("h2")]


def test_a_page_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    for path in (tmp_path / "missing" / "r.html", tmp_path):
        with pytest.raises(OutputUnwritable, match="cannot write"), open_report(path):
            raise AssertionError("the work began")


def test_a_page_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "r.html"
    path.write_text("the last one")

    def interrupted() -> None:
        with open_report(path) as report:
            report.write_ranking(Ranking(()))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "the last one"
    assert list(tmp_path.iterdir()) == [path]
    with open_report(path) as report:
        report.write_ranking(Ranking(()))
    assert "0 photos, best first" in Page(path).words


# The commands


@pytest.fixture
def culling_engine(engine: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Every two photos are a group."""

    def cull(images: list[str], *, on_photo: Callable[[], None], **more: Any) -> Culling:
        engine.culled = more
        judged = list(engine.score_many(images, budget=None, k=None, learn=False))
        for _ in judged:
            on_photo()
        good = [each for each in judged if not isinstance(each, Failure)]
        shots = [
            CulledPhoto(1 + i % 2, g.path, g.score, 0.2, g.score, 0.99) for i, g in enumerate(good)
        ]
        groups = tuple(tuple(shots[i : i + 2]) for i in range(0, len(shots), 2))
        return Culling(groups, tuple(each for each in judged if isinstance(each, Failure)))

    monkeypatch.setattr(engine, "cull", cull, raising=False)
    return engine


@pytest.fixture
def folder(grey: Grey, tmp_path: Path) -> Path:
    for number, level in enumerate((200, 100, 50)):
        grey(f"d/{number}.png", level)
    (tmp_path / "d/broken.jpg").write_bytes(b"no photo")
    return tmp_path / "d"


def test_cull_marks_the_best(culling_engine: Any, folder: Path, capsys: Output) -> None:
    assert cli.main(["cull", str(folder)]) == 1
    output = capsys.readouterr()
    lines = output.out.splitlines()
    assert [line[0] for line in lines] == ["*", " ", "*"]
    assert lines[1].endswith("(2 of 2, 2.57 alone, likeness 0.99)")
    assert lines[2].endswith("2.png")
    assert "broken.jpg" in output.err


def test_cull_in_json_and_csv(culling_engine: Any, folder: Path, capsys: Output) -> None:
    assert cli.main(["cull", str(folder), "--format", "json", "--alike", "0.8"]) == 1
    entries = json.loads(capsys.readouterr().out)
    assert [entry.get("group") for entry in entries] == [1, 1, 2, None]
    assert [entry.get("best") for entry in entries] == [True, False, True, None]
    assert culling_engine.culled["alike"] == 0.8
    assert cli.main(["cull", str(folder), "--format", "csv"]) == 1
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["place"] for row in rows] == ["1", "2", "1", ""]
    assert culling_engine.culled["alike"] == 0.55


@pytest.mark.parametrize("command", ["rank", "cull"])
def test_html_beside_the_usual_output(
    command: str, culling_engine: Any, folder: Path, tmp_path: Path, capsys: Output
) -> None:
    page = tmp_path / "page.html"
    assert cli.main([command, str(folder), "--html", str(page)]) == 1
    assert capsys.readouterr().out.count(".png") == 3
    assert len(Page(page).all("img")) == 3
    assert cli.main([command, str(folder), "--html", str(tmp_path / "no" / "page.html")]) == 2
    assert "does not exist: make it" in capsys.readouterr().err


def test_what_is_no_likeness_is_refused(engine: Any, capsys: Output) -> None:
    assert cli.main(["cull", "a.jpg", "--alike", "2"]) == 2
    assert "likeness is a cosine; got 2.0" in capsys.readouterr().err
