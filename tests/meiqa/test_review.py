"""`meiqa cull --review`: the command judges once, serves a page, and does what was decided."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Queue
from urllib.parse import urlsplit
from urllib.request import url2pathname

import httpx
import numpy as np
import pytest
from PIL import Image

from meiqa import cli
from meiqa.cli import options
from meiqa.decisions import NAME
from meiqa.engine.calibration import UNCALIBRATED, model_terms
from meiqa.journal import journals_in
from meiqa.serve import review
from meiqa.testing import FakeEngine

Grey = Callable[..., Path]
Start = Callable[..., "Started"]
Output = pytest.CaptureFixture[str]


class Started:
    """A command that runs until its review is finished."""

    def __init__(self, arguments: tuple[object, ...], said: Queue[str]) -> None:
        self.code: int | None = None
        self._arguments = ["cull", *map(str, arguments), "--review", "--no-browser"]
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        address = next(line for line in iter(lambda: said.get(timeout=30), "") if "http" in line)
        self.client = httpx.Client(base_url=address.split()[2].rstrip(";"), timeout=30)

    def _run(self) -> None:
        self.code = cli.main(self._arguments)

    def finish(self) -> list[str]:
        """Finish, and wait for the command to end."""
        lines: list[str] = self.client.post("finish").json()["lines"]
        self.end()
        return lines

    def end(self) -> None:
        self.client.close()
        self._thread.join(30)
        assert not self._thread.is_alive()


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Start:
    """Give a function that starts a review and waits for its address."""
    said: Queue[str] = Queue()
    monkeypatch.setattr(options, "say", said.put)
    return lambda *arguments: Started(arguments, said)


@pytest.fixture
def shoot(engine: FakeEngine, grey: Grey, tmp_path: Path) -> Path:
    """A folder of two shots of one thing, the second darker, and of another thing."""
    grey("shoot/1.jpg", 240)
    grey("shoot/2.jpg", 90)
    (tmp_path / "shoot/2.CR2").write_bytes(b"raw 2")
    Image.fromarray(np.full((9, 9, 3), 150, np.uint8)).save(tmp_path / "shoot/3.jpg")
    return tmp_path / "shoot"


def rating(sidecar: Path) -> str:
    return sidecar.read_text().partition('xmp:Rating="')[2].partition('"')[0]


@contextmanager
def unjudged(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """See to it that no engine is opened."""

    def opened(*_: object, **__: object) -> None:
        raise AssertionError("photos are judged once more")

    with monkeypatch.context() as patched:
        patched.setattr(options, "engine_of", opened)
        yield


def test_what_was_decided_is_done(shoot: Path, start: Start, tmp_path: Path) -> None:
    rejects, kept = tmp_path / "rejects", tmp_path / "kept.txt"
    started = start(shoot, "--xmp", "--list", kept, "--move-rejects-to", rejects)
    assert "write ratings into XMP sidecars, list" in started.client.get("state").json()["will"]
    started.client.post("ratings", json={"0": -1, "1": 4, "2": 0})
    lines = started.finish()
    assert lines[0] == "2 photos kept, 1 rejects"
    assert "undo them: meiqa cull --undo" in lines[-1]
    assert started.code == 0
    assert (rating(rejects / "1.xmp"), rating(shoot / "2.xmp")) == ("-1", "4")
    assert rating(shoot / "3.xmp") == "0"
    assert kept.read_text() == f"{shoot}/2.jpg\n{shoot}/3.jpg\n"
    assert (shoot / "2.CR2").exists()
    assert cli.main(["cull", "--undo", str(shoot)]) == 0
    assert {each.name for each in shoot.iterdir() if not each.name.startswith(".")} == {
        *("1.jpg", "2.jpg", "2.CR2", "3.jpg")
    }


def test_what_nobody_decided_is_as_proposed(shoot: Path, start: Start) -> None:
    assert start(shoot, "--xmp").finish()
    assert [rating(shoot / f"{n}.xmp") for n in (1, 2, 3)] == ["5", "-1", "3"]


@pytest.mark.slow
def test_a_second_start_goes_on(
    shoot: Path, start: Start, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    """Without judging again; a dry run and one that was asked for nothing touch nothing."""
    first = start(shoot)
    first.client.post("ratings", json={"1": 2})
    assert "nothing is done with them" in first.finish()[1]
    printed = capsys.readouterr().out
    with unjudged(monkeypatch):
        dry = start(shoot, "--xmp", "--dry-run")
        assert dry.client.get("state").json()["dry_run"] is True
        assert f"would write {shoot}/2.xmp: 2 stars, Green" in dry.finish()
        assert not [*shoot.glob("*.xmp")]
        assert journals_in(shoot) == []
        assert capsys.readouterr().out == printed
        assert start(shoot, "--xmp").finish()
        assert rating(shoot / "2.xmp") == "2"
        again = start(shoot, "--xmp")  # a change of mind
        again.client.post("ratings", json={"1": 5})
        assert again.finish()
        assert rating(shoot / "2.xmp") == "5"


@pytest.mark.slow
def test_another_calibration_judges_again(
    shoot: Path, start: Start, monkeypatch: pytest.MonkeyPatch, engine: FakeEngine
) -> None:
    """Though the package and the memory lie where they were."""
    start(shoot).finish()
    judged = len(engine.calls)
    start(shoot).finish()
    assert len(engine.calls) == judged
    terms = model_terms("cd", UNCALIBRATED)
    monkeypatch.setattr(options, "terms_unopened", lambda _: terms)
    start(shoot).finish()
    assert len(engine.calls) == 2 * judged


@pytest.mark.parametrize("raises", [True, False])
def test_an_interrupted_review_says_what_stays_and_that_it_goes_on(
    raises: bool, shoot: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    def interrupted(reviewed: review.Review, *_: object) -> None:
        reviewed.give({0: 3, 1: -1})
        if raises:
            raise KeyboardInterrupt

    monkeypatch.setattr(review, "run", interrupted)
    command = ["cull", str(shoot), "--xmp", "--review", "--no-browser"]
    assert cli.main(command) == 130
    told = capsys.readouterr().err
    assert f"nothing was done; what was decided stays in {shoot / NAME}, and the same" in told
    assert "going on" not in told
    assert not [*shoot.glob("*.xmp")]
    assert cli.main(command) == 130
    assert f"going on from {shoot / NAME}; photos decided about: 2" in capsys.readouterr().err


def test_stars_need_no_sidecars(shoot: Path, start: Start) -> None:
    started = start(shoot, "--stars", "1,1.1,1.2,1.3")
    stars = [p["stars"] for g in started.client.get("state").json()["groups"] for p in g["photos"]]
    started.finish()
    assert stars == [5, 5, 5]


def test_a_mistyped_path_leaves_nothing(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Output
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert cli.main(["cull", "empty", "--review"]) == 1
    assert cli.main(["cull", "missing/folder", "--review"]) == 1
    assert "missing/folder: no such file" in capsys.readouterr().err
    assert [*tmp_path.rglob("*")] == [tmp_path / "empty"]


def test_another_photo_is_judged_and_decisions_stay(
    shoot: Path, grey: Grey, start: Start, engine: FakeEngine
) -> None:
    first = start(shoot)
    first.client.post("ratings", json={"1": 2})
    first.finish()
    grey("shoot/0.jpg", 250)
    second = start(shoot, "--xmp")
    photos = second.client.get("state").json()["groups"][0]["photos"]
    assert [photo["rating"] for photo in photos] == [None, None, 2]
    second.finish()
    assert rating(shoot / "2.xmp") == "2"


def test_paths_may_be_relative_and_names_of_any_bytes(
    shoot: Path, grey: Grey, start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    strange = grey("other/" + os.fsdecode(b"\xff.jpg"), 10)
    monkeypatch.chdir(tmp_path)
    first = start("shoot", tmp_path / "other")
    names = [p["name"] for g in first.client.get("state").json()["groups"] for p in g["photos"]]
    assert sorted(names) == ["other/\\udcff.jpg", "shoot/1.jpg", "shoot/2.jpg", "shoot/3.jpg"]
    first.client.post("ratings", json={str(names.index("other/\\udcff.jpg")): 1})
    first.finish()
    monkeypatch.chdir(shoot)  # decisions are found from another folder, too
    start(".", "../other", "--xmp").finish()
    assert rating(strange.with_suffix(".xmp")) == "1"


def test_what_fails_is_told_on_the_page_and_by_the_code(
    shoot: Path, start: Start, tmp_path: Path
) -> None:
    started = start(shoot, "--copy-to", tmp_path / "kept")
    (tmp_path / "kept").write_text("in the way")
    assert "error: " in "".join(started.finish())
    assert started.code != 0


def test_one_review_of_photos_at_a_time(shoot: Path, start: Start) -> None:
    started = start(shoot)
    assert cli.main(["cull", str(shoot), "--review", "--no-browser"]) == 2
    started.finish()


def test_decisions_lie_beside_the_journal_if_that_is_named(
    shoot: Path, start: Start, tmp_path: Path
) -> None:
    start(shoot, "--journal", tmp_path / "j").finish()
    assert (tmp_path / "j.review").exists()
    assert not (shoot / NAME).exists()


def test_the_page_is_opened_unless_asked_not_to(
    shoot: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    opened: Queue[str] = Queue()
    monkeypatch.setattr("webbrowser.open", opened.put)
    thread = threading.Thread(target=cli.main, args=[["cull", str(shoot), "--review"]])
    thread.start()
    way_there = Path(url2pathname(urlsplit(opened.get(timeout=30)).path))
    assert way_there.stat().st_mode & 0o777 == 0o600  # others see the browser's arguments
    address = way_there.read_text().partition("url=")[2].partition('"')[0]
    assert httpx.get(address).status_code == 200
    assert httpx.post(f"{address}finish").status_code == 200
    thread.join(30)
    assert address in capsys.readouterr().err
    assert not way_there.exists()


def test_standard_input_is_not_reviewed(engine: FakeEngine, capsys: Output) -> None:
    assert cli.main(["cull", "-", "--review"]) == 2
    assert "standard input is no file that could be reviewed" in capsys.readouterr().err
    assert cli.main(["cull", "x", "--no-browser"]) == 2
    assert "--no-browser means nothing without --review" in capsys.readouterr().err
