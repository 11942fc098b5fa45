"""`meiqa camera` on a video that is made here, with an engine that judges brightness."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from meiqa import cli
from meiqa.errors import install_hint
from meiqa.serve.camera import Capture
from meiqa.testing import FakeEngine

Film = Callable[..., Path]
RATE = 50


@pytest.fixture
def film(tmp_path: Path) -> Film:
    """Write a video of greys, each a fiftieth of a second long, and give its path."""

    def write(*levels: int, name: str = "film.avi") -> Path:
        path = tmp_path / name
        with av.open(str(path), "w") as container:
            stream = container.add_stream("mjpeg", rate=RATE)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
            for level in levels:
                pixels = np.full((48, 64, 3), level, np.uint8)
                for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                    container.mux(packet)
            for packet in stream.encode():
                container.mux(packet)
        return path

    return write


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_a_video_is_judged_logged_and_its_best_shot_kept(
    engine: FakeEngine, film: Film, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = film(*[220] * 15, *[15] * 15)
    log, best = tmp_path / "log.csv", tmp_path / "best.png"
    code = cli.main(["camera", "--video", str(path), "--log", str(log), "--best", str(best)])
    assert code == 0
    judged = rows(log)
    assert judged
    assert float(judged[-1]["score"]) < 2
    assert [float(row["time_s"]) for row in judged] == sorted(float(r["time_s"]) for r in judged)
    assert np.asarray(Image.open(best)).mean() > 200
    assert f"{len(judged)} frames judged" in capsys.readouterr().err
    assert all(call.learn is False for call in engine.calls)


def test_what_is_kept_replaces_nothing(
    engine: FakeEngine, film: Film, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, log, best = film(*[100] * 9), tmp_path / "log.csv", tmp_path / "best.png"
    command = ["camera", "--video", str(path), "--log", str(log), "--best", str(best)]
    assert cli.main(command) == 0
    assert cli.main(command) == 2  # a best shot is a photo
    assert "best.png exists" in capsys.readouterr().err
    assert cli.main(command[:-2]) == 0  # a log may follow a log
    log.write_text("do,not\ntouch,this\n")
    assert cli.main(command[:-2]) == 2
    assert log.read_text() == "do,not\ntouch,this\n"
    assert cli.main([*command, "--force"]) == 0
    before = path.read_bytes()
    assert cli.main([*command[:-1], str(path), "--force"]) == 2
    assert path.read_bytes() == before
    assert cli.main([*command[:-1], str(tmp_path / "best.gif")]) == 2
    assert "is no picture's name" in capsys.readouterr().err


def test_the_dark_asks_for_light(engine: FakeEngine, film: Film, tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    assert cli.main(["camera", "--video", str(film(*[15] * 5)), "--log", str(log)]) == 0
    assert {row["instruction"] for row in rows(log)} == {"more-light"}


def test_the_log_tells_what_changed(engine: FakeEngine, film: Film, tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    path = film(*[120] * 75, *[30] * 75, *[121] * 75)
    assert cli.main(["camera", "--video", str(path), "--log", str(log), "--fps", "10"]) == 0
    judged = rows(log)
    assert (judged[0]["change"], judged[0]["change_text"]) == ("new", "A new scene")
    dark = [row for row in judged if row["change_text"] == "Darker than the last"]
    assert {row["change"] for row in dark} == {"worse"}
    after = [row for row in judged if row["change_text"].startswith("Hold it")]
    assert {row["change"] for row in after} <= {"better", "steady"}
    assert min(float(row["time_s"]) for row in after) > max(float(row["time_s"]) for row in dark)
    # A frame for which there was no time to compare says neither.
    assert all(bool(row["level"]) == bool(row["change"]) for row in judged)
    assert all(float(row["level"]) > 0 for row in judged if row["level"])


def test_no_more_looks_a_second_than_are_asked_for(
    engine: FakeEngine, film: Film, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log, path = tmp_path / "log.csv", film(*[100] * 2 * RATE)
    assert cli.main(["camera", "--video", str(path), "--fps", "4", "--log", str(log)]) == 0
    assert 2 <= len(rows(log)) <= 9
    assert "a second of 4 asked for" in capsys.readouterr().err
    assert cli.main(["camera", "--video", str(path), "--fps", "0"]) == 2


def test_it_stops_when_it_is_told_to(engine: FakeEngine, film: Film, tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    path = film(*[100] * RATE)
    assert cli.main(["camera", "--video", str(path), "--seconds", "0.2", "--log", str(log)]) == 0
    assert all(float(row["time_s"]) < 0.2 for row in rows(log))


def test_ctrl_c_is_a_clean_end(
    engine: FakeEngine,
    film: Film,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    log, frames = tmp_path / "log.csv", Capture.__iter__

    def interrupted(capture: Capture) -> Iterator[object]:
        yield next(iter(frames(capture)))
        raise KeyboardInterrupt

    monkeypatch.setattr(Capture, "__iter__", interrupted)
    assert cli.main(["camera", "--video", str(film(*[100] * 20)), "--log", str(log)]) == 0
    assert len(rows(log)) == 1
    assert "1 frames judged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--video", "nowhere.mp4"], "No such file"),
        (["--video", __file__], "can't be opened as a video"),
        (["--device", "/dev/nowhere"], "can't be opened as a camera"),
        ([], "required"),
        (["--device", "0", "--video", "a.mp4"], "means nothing beside"),
    ],
)
def test_what_is_no_camera_is_one_line(
    engine: FakeEngine,
    arguments: list[str],
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["camera", *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_without_pyav_it_names_the_extra(
    engine: FakeEngine,
    film: Film,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = film(100)
    monkeypatch.setitem(sys.modules, "av", None)
    assert cli.main(["camera", "--video", str(path)]) == 2
    assert install_hint("camera") in capsys.readouterr().err


def test_a_log_that_cannot_be_written_is_one_line(
    engine: FakeEngine, film: Film, capsys: pytest.CaptureFixture[str]
) -> None:
    code = cli.main(["camera", "--video", str(film(100)), "--log", "/nowhere/log.csv"])
    assert code == 2
    assert "cannot write /nowhere/log.csv" in capsys.readouterr().err


def test_frames_that_nobody_takes_are_dropped(film: Film) -> None:
    path = film(*range(40, 100, 2))
    with Capture(path, live=False) as capture:
        capture._thread.join()
        frames = list(capture)
    assert len(frames) == 1
    assert frames[0].dropped == 29
    assert abs(float(frames[0].pixels.mean()) - 98) < 3
