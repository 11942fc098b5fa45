"""A run over a folder ends the same, however often it is killed."""

from __future__ import annotations

import csv
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from meiqa import cli
from meiqa.errors import DecodeError, OutputUnwritable, UsageError
from meiqa.formats import RowFormat
from meiqa.outputs import PAGE, ResultFile, open_output
from meiqa.types import Assessment, Failure

Grey = Callable[..., Path]
Output = pytest.CaptureFixture[str]

NAMES = [
    "plain.jpg",
    "comma, quote\" and 'tick'.jpg",
    "new\nline.jpg",
    "return\rand tab\t.jpg",
    "größe 写真 🌅.jpg",
    "not utf-8 \udcff.jpg",
    '"\n"\n.jpg',
    "=1+1.jpg",
]
FORMATS: tuple[RowFormat, ...] = ("csv", "jsonl")


def assessment(path: str, score: float = 3.0) -> Assessment:
    summary = 'A "sharp"\npicture, well lit.'
    return Assessment(path, score, 0.2, (2.6, 3.4), 3.0, "fair", 50.0, summary)


def failure(path: str) -> Failure:
    return Failure(path, DecodeError(f"{path} is broken", hint="fetch it again"))


def results() -> list[Assessment | Failure]:
    return [
        failure(name) if number % 3 == 2 else assessment(name) for number, name in enumerate(NAMES)
    ]


def paths_in(file: Path) -> list[str]:
    text = file.read_bytes().decode()
    if file.suffix == ".csv":
        return [row["path"] for row in csv.DictReader(io.StringIO(text, newline=""), strict=True)]
    return [json.loads(line)["path"] for line in text.splitlines()]


def written(file: Path, format: RowFormat, *, resume: bool = True, **terms: Any) -> ResultFile:
    return ResultFile(file, format, terms, resume=resume)


@pytest.mark.parametrize("format", FORMATS)
def test_any_name_comes_back(format: RowFormat, tmp_path: Path) -> None:
    file = tmp_path / f"out.{format}"
    with written(file, format) as rows:
        for result in results():
            rows.write(result)
        assert all(name in rows for name in NAMES)
    expected = [n.encode("utf-8", "backslashreplace").decode() for n in NAMES]
    assert [p.encode("utf-8", "backslashreplace").decode() for p in paths_in(file)] == expected
    with written(file, format) as rows:
        assert all(name in rows for name in NAMES)
        assert len(rows) == len(NAMES)
        assert [each["path"] for each in rows.failures] == [paths_in(file)[i] for i in (2, 5)]
        assert {each["hint"] for each in rows.failures} == {"fetch it again"}


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
def test_wherever_it_is_cut_it_ends_the_same(format: RowFormat, tmp_path: Path) -> None:
    whole, cut = tmp_path / f"whole.{format}", tmp_path / f"cut.{format}"
    with written(whole, format) as rows:
        for result in results():
            rows.write(result)
    with written(cut, format):
        pass
    for end in range(len(whole.read_bytes()) + 1):
        cut.write_bytes(whole.read_bytes()[:end])
        with written(cut, format) as rows:
            for result in results():
                if result.path not in rows:
                    rows.write(result)
        assert cut.read_bytes() == whole.read_bytes(), end
        assert len(rows.failures) == 2


@pytest.mark.parametrize("format", FORMATS)
def test_zeros_that_a_power_cut_leaves_are_redone(format: RowFormat, tmp_path: Path) -> None:
    file = tmp_path / "out"
    with written(file, format) as rows:
        rows.write(assessment("a"))
        rows.write(assessment("b"))
    whole = file.read_bytes()
    file.write_bytes(whole[:-40] + bytes(40) + b"\n")
    with written(file, format) as rows:
        assert "a" in rows
        assert "b" not in rows
        rows.write(assessment("b"))
    assert file.read_bytes() == whole


def test_other_terms_are_refused_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "out.csv"
    with written(file, "csv", package="a" * 64, k=8) as rows:
        rows.write(assessment("a"))
    before = file.read_bytes()
    with pytest.raises(UsageError, match=r"another k; got 9; allowed: 8"):
        written(file, "csv", package="a" * 64, k=9)
    with pytest.raises(UsageError, match=r"another package; got b{16}; allowed: a{16};"):
        written(file, "csv", package="b" * 64, k=8)
    with pytest.raises(UsageError, match="another format"):
        written(file, "jsonl", package="a" * 64, k=8)
    with pytest.raises(UsageError, match="another budget ms; got 300; allowed: the default"):
        written(file, "csv", package="a" * 64, k=8, budget_ms=300)
    assert file.read_bytes() == before


def test_circumstances_may_change_and_are_told(tmp_path: Path) -> None:
    file = tmp_path / "out.csv"
    with ResultFile(file, "csv", {}, circumstances={"cases": 1}, resume=True) as rows:
        rows.write(assessment("a"))
    with ResultFile(file, "csv", {}, circumstances={"cases": 1}, resume=True) as rows:
        assert rows.changed == set()
    with ResultFile(file, "csv", {}, circumstances={"cases": 2}, resume=True) as rows:
        assert rows.changed == {"cases"}


def test_a_file_that_is_not_ours_stays_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "thesis.csv"
    file.write_text("do,not\ntouch,this\n")
    for resume, message in ((False, "thesis.csv exists"), (True, "no record of how")):
        with pytest.raises(UsageError, match=message):
            written(file, "csv", resume=resume)
    assert file.read_text() == "do,not\ntouch,this\n"
    ours = tmp_path / "out.csv"
    with written(ours, "csv") as rows:
        rows.write(assessment("a"))
    (tmp_path / "thesis.csv.run.json").write_bytes((tmp_path / "out.csv.run.json").read_bytes())
    with pytest.raises(UsageError, match="something else than this command's rows; got row 1"):
        written(file, "csv")
    with ours.open("a") as spoilt:
        spoilt.write("a,b\n")
    with pytest.raises(UsageError, match="got row 3"):
        written(ours, "csv")
    assert ours.read_text().endswith("a,b\n")


@pytest.mark.parametrize("record", ["", "[]", "{}", '{"terms": 3, "circumstances": {}}'])
def test_a_damaged_record_is_refused(record: str, tmp_path: Path) -> None:
    file = tmp_path / "out.csv"
    with written(file, "csv"):
        pass
    (tmp_path / "out.csv.run.json").write_text(record)
    with pytest.raises(UsageError, match="no record of how it was written"):
        written(file, "csv")


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with (
        written(tmp_path / "out.csv", "csv"),
        pytest.raises(UsageError, match="being written by another process"),
    ):
        written(tmp_path / "out.csv", "csv")


def test_a_full_disk_loses_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk takes half a row and then no more."""
    file, room, write = tmp_path / "out.csv", [700], os.write

    def write_while_there_is_room(descriptor: int, data: bytes) -> int:
        taken = data[: room[0]]
        room[0] -= len(taken)
        if data and not taken:
            raise OSError(28, "No space left on device")
        return write(descriptor, taken)

    monkeypatch.setattr("meiqa.outputs.os.write", write_while_there_is_room)

    def fill() -> None:
        with written(file, "csv") as rows:
            for number in range(100):
                rows.write(assessment(f"{number}.jpg"))

    with pytest.raises(OutputUnwritable, match=r"No space left on device.*--resume"):
        fill()
    monkeypatch.undo()
    done = len(paths_in(file))
    assert 0 < done < 100
    with written(file, "csv") as rows:
        assert len(rows) == done
        for number in range(done, 100):
            rows.write(assessment(f"{number}.jpg"))
    assert paths_in(file) == [f"{number}.jpg" for number in range(100)]


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(OutputUnwritable, match="cannot write"):
        written(tmp_path / "missing" / "out.csv", "csv")
    with pytest.raises(OutputUnwritable, match="cannot write"):
        written(tmp_path, "csv")


def test_failures_do_not_keep_pixels_alive(tmp_path: Path) -> None:
    """A failure's traceback would hold the photo it happened on."""
    with written(tmp_path / "out.csv", "csv") as rows:
        rows.write(failure("a"))
        assert rows.failures == [
            {"path": "a", "error": "a is broken; fetch it again", "hint": "fetch it again"}
        ]


# Where outputs may lie


def put(path: Path | str, data: bytes = b"<!-- made by meiqa --> new", **more: Any) -> None:
    with open_output(path, PAGE, **more) as file:
        file.write(data)


def test_an_output_replaces_nothing_but_its_own_kind(tmp_path: Path) -> None:
    file = tmp_path / "f"
    put(file)
    put(file, b"<!-- made by meiqa --> newer")
    assert file.read_bytes().endswith(b"newer")
    file.write_bytes(b"a thesis")
    with pytest.raises(UsageError, match=r"exists, and is no page that meiqa made; .*--force"):
        put(file)
    assert file.read_bytes() == b"a thesis"
    put(file, force=True)
    assert file.read_bytes().endswith(b"new")
    assert list(tmp_path.iterdir()) == [file]


def test_an_output_is_never_an_input(tmp_path: Path) -> None:
    photo, link = tmp_path / "a.jpg", tmp_path / "link"
    put(photo)
    link.hardlink_to(photo)
    with pytest.raises(UsageError, match="is to be read"):
        put(link, force=True, inputs=[tmp_path / "none", photo])


def test_a_link_stays_and_its_target_is_written(tmp_path: Path) -> None:
    link, target = tmp_path / "link", tmp_path / "deep" / "target"
    target.parent.mkdir()
    link.symlink_to(target)
    put(link)
    assert link.is_symlink()
    assert target.read_bytes().endswith(b"new")
    target.write_bytes(b"a thesis")
    with pytest.raises(UsageError, match="--force"):
        put(link)


@pytest.mark.parametrize("force", [False, True])
def test_devices_pipes_and_directories_are_left_alone(force: bool, tmp_path: Path) -> None:
    pipe, device = tmp_path / "pipe", tmp_path / "full"
    os.mkfifo(pipe)
    device.symlink_to("/dev/full")
    for path, what in (
        (pipe, "a device or a pipe"),
        (device, "a device or a pipe"),
        (tmp_path, "a directory"),
        (tmp_path / "none" / "f", "no directory"),
    ):
        with pytest.raises(OutputUnwritable, match=f"cannot write .*{what}"):
            put(path, force=force)
        with pytest.raises(OutputUnwritable, match="cannot write"):
            ResultFile(path, "csv", {}, resume=True, force=force)


def test_an_output_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "f"
    put(file)
    before = file.read_bytes()

    def interrupted() -> None:
        with open_output(file, PAGE) as stream:
            stream.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    put(tmp_path / "nothing", b"")
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def test_two_writers_of_one_number_do_not_meet(tmp_path: Path) -> None:
    """As processes of two machines are."""
    with (
        open_output(tmp_path / "a.html", PAGE, force=True) as last,
        open_output(tmp_path / "a.html", PAGE, force=True) as first,
    ):
        first.write(b"first")
        last.write(b"last")
    assert (tmp_path / "a.html").read_bytes() == b"last"
    assert os.listdir(tmp_path) == ["a.html"]


def test_what_is_put_there_meanwhile_is_kept(tmp_path: Path) -> None:
    def write() -> None:
        with open_output(tmp_path / "f", PAGE) as stream:
            stream.write(b"page")
            (tmp_path / "f").write_bytes(b"a thesis")

    with pytest.raises(UsageError, match="--force"):
        write()
    assert (tmp_path / "f").read_bytes() == b"a thesis"


# The command


@pytest.fixture
def folder(engine: Any, grey: Grey, tmp_path: Path) -> Path:
    for number in range(4):
        grey(f"d/{number}, grey.png", 60 * number)
    (tmp_path / "d/broken.jpg").write_bytes(b"no photo")
    return tmp_path / "d"


def scored(folder: Path, out: Path, *more: str) -> int:
    return cli.main(["score", str(folder), "--format", "csv", "--output", str(out), *more])


def test_score_goes_on_and_lists_what_failed_before(
    engine: Any, folder: Path, tmp_path: Path, capsys: Output
) -> None:
    out = tmp_path / "out.csv"
    assert scored(folder, out, "--resume") == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "broken.jpg" in captured.err
    assert "1 of 5 inputs could not be assessed" in captured.err
    assert "5 rows, 5 of them new" in captured.err
    whole = out.read_bytes()
    assert scored(folder, out) == 2
    assert "exists; go on with it: --resume" in capsys.readouterr().err
    calls = len(engine.calls)
    assert scored(folder, out, "--resume") == 1
    captured = capsys.readouterr()
    assert "1 of 5 inputs could not be assessed" in captured.err
    assert "5 rows, 0 of them new" in captured.err
    assert len(engine.calls) == calls
    assert out.read_bytes() == whole
    assert scored(folder, out, "--resume", "--k", "2") == 2
    assert "another k; got 2; allowed: the default" in capsys.readouterr().err


def test_rows_are_begun_anew_if_forced(
    engine: Any, folder: Path, tmp_path: Path, capsys: Output
) -> None:
    out = tmp_path / "out.csv"
    scored(folder, out)
    assert scored(folder, out, "--force", "--k", "2") == 1
    assert "5 rows, 5 of them new" in capsys.readouterr().err
    photo = folder / "1, grey.png"
    before = photo.read_bytes()
    assert scored(folder, photo, "--force") == 2
    assert "is to be read" in capsys.readouterr().err
    assert photo.read_bytes() == before


@pytest.mark.parametrize("name", ["-", "/dev/stdout"])
def test_rows_to_standard_output(name: str, engine: Any, folder: Path, capsys: Output) -> None:
    assert cli.main(["score", str(folder), "--format", "csv", "--output", name]) == 1
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert len(rows) == 5
    assert not any(call.learn for call in engine.calls)


def test_new_photos_are_added(
    engine: Any, folder: Path, grey: Grey, tmp_path: Path, capsys: Output
) -> None:
    out = tmp_path / "out.csv"
    scored(folder, out)
    grey("d/0.png", 5)
    scored(folder, out, "--resume")
    assert "6 rows, 1 of them new" in capsys.readouterr().err
    assert Path(paths_in(out)[-1]).name == "0.png"


def test_nothing_is_learned_and_each_photo_has_one_row(
    engine: Any, folder: Path, tmp_path: Path, capsys: Output
) -> None:
    out = tmp_path / "out.csv"
    twice = str(folder / "1, grey.png")
    assert cli.main(["score", twice, twice, "--format", "csv", "--output", str(out)]) == 0
    assert paths_in(out) == [twice]
    assert [call.learn for call in engine.calls] == [False]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--resume"], "--resume means nothing without --output"),
        (["--output", "o"], "--output takes one row a photo; got --format text"),
        (["--output", "o", "--format", "json"], "allowed: csv, jsonl"),
        (["--output", "o", "--format", "csv", "--admission", "all"], "nothing beside --output"),
        (["--output", "o", "--format", "csv", "--map", "m"], "nothing beside --map"),
        (["--output", "o", "--format", "csv", "--reference", "r"], "beside --reference"),
        (["--output", "-", "--format", "csv", "--resume"], "leave out --resume"),
    ],
)
def test_options_that_do_not_go_together(
    engine: Any, more: list[str], message: str, capsys: Output
) -> None:
    assert cli.main(["score", "a.jpg", *more]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_memory_that_has_changed_is_told(
    engine: Any, folder: Path, tmp_path: Path, capsys: Output
) -> None:
    out = tmp_path / "out.csv"
    scored(folder, out)
    engine.scorer.memory = SimpleNamespace(
        snapshot=lambda: SimpleNamespace(count_anchors=3, count_contrast=9)
    )
    scored(folder, out, "--resume")
    assert "warning: the memory has changed since" in capsys.readouterr().err


SLOW_RUN = """
import sys, time
from meiqa import cli
from meiqa.cli import options
from meiqa.testing import FakeEngine

engine = FakeEngine(before=lambda name: time.sleep(0.004))
options.engine_of = lambda *_, **__: engine
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
def test_a_run_that_is_killed_ends_as_if_it_was_not(
    format: RowFormat, grey: Grey, tmp_path: Path
) -> None:
    for number in range(120):
        grey(f"d/{number:03d},\n{'é' * (number % 7)}.png", 2 * number)
    (tmp_path / "d/050 broken.jpg").write_bytes(b"no photo")
    root = Path(__file__).parents[2]

    def start(out: Path) -> subprocess.Popen[bytes]:
        options = ["--format", format, "--output", str(out), "--resume"]
        command = [sys.executable, "-c", SLOW_RUN, "score", str(tmp_path / "d"), *options]
        with (tmp_path / "errors").open("wb") as errors:
            return subprocess.Popen(command, cwd=root, stderr=errors)

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(whole).wait() == 1
    chance, kills, sizes = random.Random(7), 0, []
    while True:
        run = start(killed)
        begun = killed.stat().st_size if killed.exists() else 0
        while run.poll() is None and (not killed.exists() or killed.stat().st_size <= begun):
            time.sleep(0.002)
        time.sleep(chance.uniform(0.0, 0.15))
        if run.poll() is not None or kills == 6:
            break
        run.send_signal(signal.SIGKILL)
        run.wait()
        kills += 1
        sizes.append(killed.stat().st_size)
    assert run.wait() == 1
    assert kills == 6
    assert sizes == sorted(set(sizes))  # each run brought it on
    assert b"1 of 121 inputs could not be assessed" in (tmp_path / "errors").read_bytes()
    assert killed.read_bytes() == whole.read_bytes()
    assert len(paths_in_rows(killed, format)) == 121


def paths_in_rows(file: Path, format: RowFormat) -> list[str]:
    renamed = file.with_suffix(f".{format}")
    renamed.write_bytes(file.read_bytes())
    paths = paths_in(renamed)
    assert len(set(paths)) == len(paths)
    return paths
