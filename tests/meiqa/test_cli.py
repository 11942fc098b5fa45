"""The commands, with an engine that needs no model; bad input never shows a traceback."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

from meiqa import cli
from meiqa.cli import options
from meiqa.cli.options import Options
from meiqa.errors import (
    DeviceUnavailable,
    ImageError,
    MeiqaError,
    PackageCorrupted,
    PackageNotFound,
    StoreMismatch,
)
from meiqa.labels import LabelTable
from meiqa.locations import embedded_assets
from meiqa.testing import Call, FakeEngine
from meiqa.types import Budget

Grey = Callable[..., Path]
Output = pytest.CaptureFixture[str]


def errors_of(output: Output) -> list[str]:
    """Give the lines on stderr, each of which must be one of ours."""
    lines = output.readouterr().err.splitlines()
    assert all(line.startswith("meiqa: ") for line in lines), lines
    assert not any("Traceback" in line for line in lines)
    return lines


def json_of(output: Output) -> Any:
    return json.loads(output.readouterr().out)


def test_score_in_json_is_an_array(engine: Any, grey: Grey, capsys: Output) -> None:
    photo = grey("a.png", 255)
    assert cli.main(["score", str(photo), "--format", "json"]) == 0
    (result,) = json_of(capsys)
    assert (result["path"], result["score"], result["word"]) == (str(photo), 5.0, "excellent")


def test_score_hands_its_options_on(engine: Any, grey: Grey, capsys: Output) -> None:
    photo = str(grey("a.png"))
    assert cli.main(["score", photo, "--budget-ms", "300", "--k", "2", "--no-learn"]) == 0
    assert engine.calls == [Call(photo, Budget(ms=300), 2, False, None)]
    assert cli.main(["score", photo]) == 0
    assert engine.calls[1] == Call(photo, None, None, True, None)


def test_engine_options_reach_the_seam(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Output
) -> None:
    seen: list[Any] = []

    def refuse(options: Options, *, learn: bool) -> None:
        seen.append((options, learn))
        raise PackageNotFound("no engine package at P", hint="build one")

    monkeypatch.setattr(options, "engine_of", refuse)
    chosen = ["--package", "P", "--memory", str(tmp_path), "--device", "cuda", "--threads", "1"]
    assert cli.main(["score", "x.jpg", *chosen, "--no-verify"]) == 2
    ((asked, learn),) = seen
    assert (asked.package, asked.memory) == ("P", str(tmp_path))
    assert (asked.device, asked.threads, asked.no_verify, learn) == ("cuda", 1, True, True)
    assert errors_of(capsys) == ["meiqa: error: no engine package at P; build one"]


def test_a_directory_stands_for_the_photos_below_it(
    engine: Any, grey: Grey, tmp_path: Path, capsys: Output
) -> None:
    for name in ("d/b.PNG", "d/a.png", "d/c/z.png", "d/.hidden.png"):
        grey(name)
    (tmp_path / "d/notes.txt").write_text("no photo")
    assert cli.main(["score", str(tmp_path / "d"), "--format", "jsonl"]) == 0
    paths = [json.loads(line)["path"] for line in capsys.readouterr().out.splitlines()]
    assert paths == [str(tmp_path / "d" / name) for name in ("a.png", "b.PNG", "c/z.png")]


def bad_photo(kind: str, folder: Path) -> Path:
    path = folder / f"{kind}.png"
    whole = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(whole, "PNG")
    contents = {
        "truncated": whole.getvalue()[:900],
        "empty": b"",
        "text": b"not an image at all",
        "newline\nname": b"nor this",
    }
    if kind == "directory.txt":
        path.mkdir()
    elif kind in contents:
        path.write_bytes(contents[kind])
    elif kind == "float":
        path = folder / "float.tif"
        Image.new("F", (3, 3)).save(path)
    return path


BAD_KINDS = ["truncated", "empty", "text", "newline\nname", "missing", "directory.txt", "float"]


@pytest.mark.parametrize("kind", BAD_KINDS)
@pytest.mark.parametrize("format", ["text", "json", "jsonl", "csv"])
def test_score_goes_on_after_a_bad_photo(
    engine: Any, grey: Grey, tmp_path: Path, capsys: Output, kind: str, format: str
) -> None:
    bad, good = bad_photo(kind, tmp_path), grey("good.png")
    assert cli.main(["score", str(bad), str(good), "--format", format]) == 1
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert all(line.startswith("meiqa: ") for line in lines)
    assert str(bad).replace("\n", "\\n") in lines[0]
    assert str(good) in captured.out
    if format == "json":
        failed, scored = json.loads(captured.out)
        assert failed.keys() == {"path", "error", "hint"}
        assert (failed["path"], scored["path"]) == (str(bad), str(good))
    if format == "csv":
        assert next(csv.DictReader(io.StringIO(captured.out)))["error"]


@pytest.mark.parametrize("kind", [*BAD_KINDS, "bomb"])
def test_compare_refuses_a_bad_photo_in_one_line(
    engine: Any, grey: Grey, tmp_path: Path, capsys: Output, kind: str
) -> None:
    bad = bad_photo(kind, tmp_path)
    if kind == "bomb":
        Image.new("1", (10_001, 10_000)).save(bad)
    assert cli.main(["compare", str(grey("good.png")), str(bad)]) == 1
    (line,) = errors_of(capsys)
    assert str(bad).replace("\n", "\\n") in line


def test_several_failures_are_counted(engine: Any, grey: Grey, capsys: Output) -> None:
    photos = ["none1.jpg", str(grey("a.png")), "none2.jpg"]
    assert cli.main(["score", *photos]) == 1
    lines = errors_of(capsys)
    assert "none1.jpg: no such file" in lines[0]
    assert lines[-1] == "meiqa: 2 of 3 inputs could not be assessed"


def test_directories_without_photos_are_counted(
    engine: Any, grey: Grey, tmp_path: Path, capsys: Output
) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    paths = [str(tmp_path / "one"), str(tmp_path / "two"), "none.jpg", str(grey("a.png"))]
    assert cli.main(["score", *paths]) == 1
    assert errors_of(capsys)[-1] == "meiqa: 3 of 4 inputs could not be assessed"


def test_an_error_that_names_no_file_gets_its_name(
    engine: Any, grey: Grey, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ImageError("too elongated")

    monkeypatch.setattr(engine, "score", refuse)
    photo = str(grey("a.png"))
    assert cli.main(["score", photo]) == 1
    assert errors_of(capsys) == [f"meiqa: error: {photo}: too elongated"]


def test_a_directory_without_photos(engine: Any, tmp_path: Path, capsys: Output) -> None:
    assert cli.main(["score", str(tmp_path), "--format", "json"]) == 1
    captured = capsys.readouterr()
    assert "holds no photos" in captured.err
    assert json.loads(captured.out)[0]["path"] == str(tmp_path)


@pytest.mark.parametrize(
    "error",
    [
        PackageNotFound("no package"),
        PackageCorrupted("graph.onnx has another digest"),
        StoreMismatch("built for another package"),
        DeviceUnavailable("no CUDA device"),
    ],
)
@pytest.mark.parametrize("command", [["score", "a.jpg"], ["compare", "a.jpg", "b.jpg"], ["demo"]])
def test_what_cannot_be_opened_exits_2(
    error: MeiqaError, command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(options, "engine_of", refuse)
    assert cli.main([*command]) == 2
    captured = capsys.readouterr()
    assert captured.err == f"meiqa: error: {error}\n"
    assert captured.out == ""


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["frobnicate"],
        ["memory"],
        ["memory", "frobnicate"],
        ["score"],
        ["score", ""],
        ["score", "a.jpg", "--k", "2.5"],
        ["score", "a.jpg", "--format", "xml"],
        ["score", "a.jpg", "--budget-ms", "0"],
        ["score", "a.jpg", "--budget-ms", "nan"],
        ["score", "a.jpg", "--budget-ms", "soon"],
        ["score", "a.jpg", "--k", "-1"],
        ["score", "a.jpg", "--threads", "0"],
        ["score", "a.jpg", "--device", "tpu"],
        ["score", "a.jpg", "--surprise"],
        ["compare", "a.jpg"],
        ["eval", "labels.csv"],
        ["eval", "labels.csv", "--images", ".", "--format", "csv"],
        ["eval", "labels.csv", "--images", ".", "--mos-range", "low", "high"],
    ],
)
def test_wrong_usage_is_one_line_and_exits_2(command: list[str], capsys: Output) -> None:
    assert cli.main(command) == 2
    (line,) = errors_of(capsys)
    assert line.startswith("meiqa: error: ")
    assert "--help`" in line


@pytest.mark.parametrize(
    ("option", "value", "wanted"),
    [
        ("--k", "a", "a whole number from 0 up"),
        ("--k", "-1", "a whole number from 0 up"),
        ("--k", "2.5", "a whole number from 0 up"),
        ("--threads", "2.5", "a whole number from 1 up"),
        ("--budget-ms", "soon", "'soon' is not a number above 0"),
        ("--budget-ms", "inf", "'inf' is not a number above 0"),
        ("--exclude-above", "nan", "'nan' is not a finite number"),
        ("--head", "softmax", "'text', 'levels', 'grm'"),
        ("--package", "", "'' is no path"),
        ("--memory", "nowhere", "no directory nowhere"),
    ],
)
def test_a_value_that_is_none_is_told_what_it_should_be(
    option: str, value: str, wanted: str, capsys: Output
) -> None:
    assert cli.main(["score", "a.jpg", option, value]) == 2
    (line,) = errors_of(capsys)
    assert line.startswith(f"meiqa: error: {option}: ")
    assert value in line
    assert wanted in line


def test_a_port_is_one_there_is(capsys: Output) -> None:
    assert cli.main(["serve", "--port", "99999"]) == 2
    (line,) = errors_of(capsys)
    assert "99999" in line
    assert "a whole number from 0 to 65535" in line


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["scor", "x.jpg"], "No such command 'scor'. Did you mean score?; see `meiqa --help`"),
        (["xyzzy"], "No such command 'xyzzy'; see `meiqa --help`"),
        (["cull", "--html"], "see `meiqa cull --help`"),
        (["memory", "create", "--memory"], "see `meiqa memory create --help`"),
    ],
)
def test_what_is_mistyped_is_led_to_what_was_meant(
    arguments: list[str], told: str, capsys: Output
) -> None:
    assert cli.main(arguments) == 2
    (line,) = errors_of(capsys)
    assert line.endswith(told)


def test_compare(engine: Any, grey: Grey, capsys: Output) -> None:
    dark, bright = str(grey("dark.png", 20)), str(grey("bright.png", 200))
    assert cli.main(["compare", dark, bright]) == 0
    assert f"{bright} looks better than {dark} with probability 0.94" in capsys.readouterr().out
    assert cli.main(["compare", dark, bright, "--format", "json"]) == 0
    assert json_of(capsys)["preference"] == pytest.approx(0.056, abs=1e-3)


def test_ask(engine: Any, grey: Grey, capsys: Output) -> None:
    dark, bright = str(grey("dark.png", 20)), str(grey("bright.png", 200))
    command = ["ask", dark, "Is it well exposed?", "--options", "no, yes"]
    assert cli.main(command) == 0
    printed = capsys.readouterr()
    assert not printed.err
    told = printed.out.splitlines()
    assert told[0] == f"{dark}: Is it well exposed?"
    assert [line.split()[1] for line in told[1:]] == ["no", "yes"]
    assert cli.main([*command, "Is it dark?", "--second", bright, "--format", "json"]) == 0
    first, second = json_of(capsys)
    assert (first["question"], second["question"]) == ("Is it well exposed?", "Is it dark?")
    assert first["second"] == second["second"] == bright
    assert first["probabilities"]["no"] > 0.9
    assert cli.main([*command, "--format", "csv"]) == 0
    header, row, _ = capsys.readouterr().out.splitlines()
    assert header == "path,question,second,option,probability,logprob"
    assert row.startswith(f"{dark},Is it well exposed?,,no,0.9")


def test_options_that_a_model_would_not_reply_are_warned_of(
    engine: Any, grey: Grey, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("meiqa.cli.score.UNLIKELY", 1.0)
    assert cli.main(["ask", str(grey("a.png")), "Is it dark?", "--options", "no,yes"]) == 0
    assert "warning: the model would reply something else to 'Is it dark?'" in errors_of(capsys)[0]


def test_a_question_without_words_is_refused(engine: Any, grey: Grey, capsys: Output) -> None:
    assert cli.main(["ask", str(grey("a.png")), "", "--options", "yes,no"]) == 2
    assert "a question has a text" in errors_of(capsys)[0]


@pytest.mark.parametrize("given", ["yes,", "yes,yes", ","])
def test_options_that_are_none_are_refused(given: str, grey: Grey, capsys: Output) -> None:
    assert cli.main(["ask", str(grey("a.png")), "Why?", "--options", given]) == 2
    (line,) = errors_of(capsys)
    assert f"{given!r} holds an empty option, or one twice" in line


@pytest.fixture
def labels(grey: Grey, tmp_path: Path) -> Path:
    path = tmp_path / "labels.csv"
    rows = [f"{grey(f'{level}.png', level).name},{level / 255},val" for level in (20, 90, 200, 250)]
    path.write_text("\n".join(["file,mos,split", *rows]) + "\n")
    return path


@pytest.mark.slow
def test_eval_in_json(engine: Any, labels: Path, capsys: Output) -> None:
    command = ["eval", str(labels), "--images", str(labels.parent), "--split", "val"]
    assert cli.main([*command, "--format", "json"]) == 0
    report = json_of(capsys)
    assert report["n"] == 4
    assert report["fused"]["srcc"] == pytest.approx(1)
    assert all(not call.learn for call in engine.calls)
    assert cli.main(command) == 0
    assert "4 photos, K = 3, human scores 0 to 1" in capsys.readouterr().out


@pytest.mark.slow
def test_eval_knows_nothing_that_was_learnt(
    engine: Any, labels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memories: list[str] = []

    def engine_of(options: Options) -> Any:
        memories.append(options.memory)
        return engine

    monkeypatch.setattr(options, "engine_of", engine_of)
    monkeypatch.setenv("MEIQA_MEMORY", str(tmp_path / "learnt"))
    command = ["eval", str(labels), "--images", str(labels.parent)]
    assert cli.main(command) == 0
    assert cli.main([*command, "--memory", str(tmp_path)]) == 0
    assert memories == [str(embedded_assets() / "memory"), str(tmp_path)]


def test_the_embedded_memory_holds_anchors_alone() -> None:
    files = {path.name for path in (embedded_assets() / "memory").iterdir()}
    assert files == {"anchors.seg", "anchors.sqlite3"}


def test_eval_lists_missing_images_and_exits_1(engine: Any, labels: Path, capsys: Output) -> None:
    (labels.parent / "90.png").unlink()
    command = ["eval", str(labels), "--images", str(labels.parent), "--format", "json"]
    assert cli.main(command) == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out)["failures"][0]["path"].endswith("90.png")
    assert "scores are taken to be from 0 to 1" in captured.err.splitlines()[0]
    assert "90.png: no such file" in captured.err.splitlines()[1]


@pytest.mark.slow
def test_eval_writes_a_row_for_each_photo(
    engine: Any, labels: Path, tmp_path: Path, capsys: Output
) -> None:
    rows = tmp_path / "rows.csv"
    command = ["eval", str(labels), "--images", str(labels.parent), "--output", str(rows)]
    for _ in range(2):  # a second time it replaces its own
        assert cli.main(command) == 0
    assert "95 % interval of the SRCC, initial: " in capsys.readouterr().out
    header, *lines = rows.read_text().splitlines()
    assert header == "path,human,score,std,ci95_low,ci95_high,initial_score"
    assert len(lines) == 4
    assert all(Path(line.split(",")[0]).is_file() for line in lines)
    rows.write_text("a thesis")
    assert cli.main(command) == 2
    assert rows.read_text() == "a thesis"


def test_eval_writes_rows_over_nothing_that_it_reads_and_not_into_its_report(
    engine: Any, labels: Path, capsys: Output
) -> None:
    command = ["eval", str(labels), "--images", str(labels.parent), "--force", "--output"]
    photo = next(labels.parent.glob("*.png"))
    before = labels.read_bytes(), photo.read_bytes()
    for target in (labels, photo):
        assert cli.main([*command, str(target)]) == 2
    assert (labels.read_bytes(), photo.read_bytes()) == before
    assert cli.main([*command, "-"]) == 2
    assert "name a file for the rows" in capsys.readouterr().err


@pytest.mark.slow
def test_eval_draws(engine: Any, labels: Path, tmp_path: Path, capsys: Output) -> None:
    plots = tmp_path / "deep" / "plots"
    command = ["eval", str(labels), "--images", str(labels.parent), "--plots", str(plots)]
    for _ in range(2):  # a second time it replaces its own
        assert cli.main(command) == 0
    text = capsys.readouterr().out
    for name in ("predicted", "histograms", "reliability"):
        assert (plots / f"{name}.png").is_file()
        assert str(plots / f"{name}.png") in text
    (plots / "histograms.png").write_bytes(b"a thesis")
    assert cli.main(command) == 2
    assert (plots / "histograms.png").read_bytes() == b"a thesis"
    assert cli.main([*command, "--force"]) == 0


def test_calibrate_hands_its_options_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Output
) -> None:
    asked: list[tuple[object, ...]] = []

    def calibrate_package(*arguments: object, on_progress: Callable[[], None]) -> dict[str, float]:
        asked.append(arguments)
        on_progress()
        return {"sigma": 0.5}

    room = ModuleType("meiqa.evaluation.calibration")
    room.calibrate_package = calibrate_package  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "meiqa.evaluation.calibration", room)
    (tmp_path / "l.csv").write_text("file,mos\na.png,1\nb.png,5\n")
    command = ["calibrate", str(tmp_path / "l.csv"), "--images", "I", "--memory", str(tmp_path)]
    assert cli.main([*command, "--package", "P"]) == 0
    assert json_of(capsys) == {"sigma": 0.5}
    remote = ["--remote", "http://x/v1", "--limit", "9", "--memory-share", "0"]
    assert cli.main([*command, *remote]) == 0
    rest = (tmp_path, LabelTable(("a.png", "b.png"), (1.0, 5.0), (1.0, 5.0)), Path("I"))
    assert asked == [(Path("P"), *rest, 500, None), ("http://x/v1", *rest, 9, 0.0)]
    capsys.readouterr()
    assert cli.main(command) == 2
    assert "--package DIR or --remote URL" in errors_of(capsys)[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budgets", "50", "0"], "--budgets: '0' is not a number above 0"),
        (["--force"], "--force means nothing without --output or --plots"),
    ],
)
def test_eval_options_that_mean_nothing(
    engine: Any, labels: Path, arguments: list[str], message: str, capsys: Output
) -> None:
    assert cli.main(["eval", str(labels), "--images", str(labels.parent), *arguments]) == 2
    assert message in errors_of(capsys)[0]
    assert engine.calls == []


def test_eval_of_nothing_usable(engine: Any, tmp_path: Path, capsys: Output) -> None:
    table = tmp_path / "t.csv"
    for command in (
        [str(table), "--images", str(tmp_path)],
        [str(tmp_path), "--images", str(tmp_path)],
    ):
        assert cli.main(["eval", *command]) == 2
        assert len(errors_of(capsys)) == 1
    table.write_text("file,mos\na.png,3\n")
    assert cli.main(["eval", str(table), "--images", str(tmp_path / "none")]) == 2
    assert "no such directory" in errors_of(capsys)[-1]


def test_unexpected_errors_are_one_line_too(
    engine: Any, grey: Grey, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("several\nlines")

    monkeypatch.setattr(engine, "score", fail)
    assert cli.main(["score", str(grey("a.png"))]) == 70
    assert "unexpected RuntimeError: several\\nlines; MEIQA_DEBUG=1" in errors_of(capsys)[0]
    monkeypatch.setenv("MEIQA_DEBUG", "1")
    with pytest.raises(RuntimeError):
        cli.main(["score", "a.jpg"])


def test_interrupt_exits_130_with_one_line(
    engine: Any, grey: Grey, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> Iterator[None]:
        yield engine.score(grey("a.png"))
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "score_many", interrupted)
    assert cli.main(["score", "a.jpg", "b.jpg", "--format", "json"]) == 130
    captured = capsys.readouterr()
    assert captured.err == "meiqa: interrupted\n"
    assert len(json.loads(captured.out)) == 1


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    """A pipe whose reading end is closed before anything is written."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "meiqa", "score", str(tmp_path), "--format", "json"]
    result = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (result.returncode, result.stderr) == (141, "")


@pytest.mark.parametrize(
    "command",
    [["score", "none.jpg", "--format", "json"], ["inspect", "PACKAGE"], ["--help"], ["--version"]],
)
@pytest.mark.parametrize("stdout", [">&-", "> /dev/full"])
def test_output_that_cannot_be_written_is_one_line(command: list[str], stdout: str) -> None:
    package = str(embedded_assets() / "package")
    words = [package if word == "PACKAGE" else word for word in command]
    shell = ["/bin/sh", "-c", f'exec "$@" {stdout}', "sh", sys.executable, "-m", "meiqa", *words]
    run = subprocess.run(shell, stderr=subprocess.PIPE, text=True)
    lines = run.stderr.splitlines()
    assert run.returncode == 2
    assert lines[-1].startswith("meiqa: error: standard output can't be written; got ")
    assert all(line.startswith("meiqa: ") for line in lines)


@pytest.mark.parametrize("streams", ["2>&-", "<&-", "<&- 2>&-"])
def test_other_closed_streams_are_no_error(streams: str) -> None:
    package = str(embedded_assets() / "package")
    command = [sys.executable, "-m", "meiqa", "inspect", package]
    shell = ["/bin/sh", "-c", f'exec "$@" {streams}', "sh", *command]
    run = subprocess.run(shell, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
    assert "decoder.onnx" in run.stdout


def test_an_error_of_another_file_is_not_taken_for_one_of_stdout(
    engine: FakeEngine, grey: Grey, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/some/file")

    monkeypatch.setattr(engine, "score", fail)
    assert cli.main(["score", str(grey("a.png"))]) == 70
    assert "/some/file" in errors_of(capsys)[0]


def test_version_and_help(capsys: Output) -> None:
    for option, word in (
        ("--version", "meiqa "),
        ("--help", "score photos"),
        ("-h", "score photos"),
    ):
        assert cli.main([option]) == 0
        assert word in capsys.readouterr().out


def test_names_outside_the_terminals_alphabet_are_escaped(
    engine: Any, grey: Grey, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    assert cli.main(["score", str(grey("größe.png"))]) == 0
    assert rb"gr\xf6\xdfe.png" in raw.getvalue()
