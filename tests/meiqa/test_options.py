"""What commands share: options that need others, and progress for people who watch."""

from __future__ import annotations

import io
import os
from contextlib import redirect_stderr
from pathlib import Path

import pytest

from meiqa import Engine, cli
from meiqa.engine.calibration import UNCALIBRATED
from meiqa.engine.runtime import onnx
from meiqa.errors import UsageError
from meiqa.progress import Progress
from meiqa.testing import FakeEngine

Output = pytest.CaptureFixture[str]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def drawn(total: int, stream: io.StringIO) -> str:
    with redirect_stderr(stream), Progress(total) as progress:
        for _ in range(total):
            progress.clear()
            progress.advance()
    return stream.getvalue()


def test_a_terminal_sees_the_count_and_is_left_clean() -> None:
    text = drawn(3, Terminal())
    assert "[##########----" in text
    assert "2/3" in text
    assert "s left" in text
    assert "images/s" in text
    assert text.endswith("\r\x1b[K")


def test_speed_and_time_left_follow_from_the_latest_images(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A hundred that are found done at once do not make the rest look fast."""
    now, stream = 0.0, Terminal()
    monkeypatch.setattr("meiqa.progress.time.monotonic", lambda: now)
    with redirect_stderr(stream), Progress(200) as progress:
        for _ in range(100):
            progress.advance()
        for _ in range(40):
            now += 4.0
            progress.advance()
        drawn_last = stream.getvalue()
    assert drawn_last.endswith("140/200  0.25 images/s  240 s left")


def test_long_work_says_once_a_minute_what_is_left_where_nobody_sees_a_bar(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, stream = 0.0, io.StringIO()
    monkeypatch.setattr("meiqa.progress.time.monotonic", lambda: now)
    with redirect_stderr(stream), Progress(10) as progress:
        for _ in range(10):
            now += 25.0
            progress.advance()
    assert stream.getvalue().splitlines() == [
        "meiqa: 1/10  0.04 images/s  225 s left",
        "meiqa: 4/10  0.04 images/s  150 s left",
        "meiqa: 7/10  0.04 images/s  75 s left",
    ]


def test_a_step_says_what_is_left_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    now, stream = 0.0, Terminal()
    monkeypatch.setattr("meiqa.progress.time.monotonic", lambda: now)
    with redirect_stderr(stream), Progress() as progress:
        for step in ("observing", "measuring"):
            progress.show(step, 0.0)
            assert stream.getvalue().endswith(f"] {step}")  # nothing is known yet
            now += 30.0
            progress.show(step, 0.25)
            assert stream.getvalue().endswith(f"{step}  90 s left")


@pytest.mark.parametrize(
    ("total", "stream"), [(3, io.StringIO()), (1, Terminal()), (0, Terminal())]
)
def test_nothing_is_drawn_for_a_file_or_a_single_photo(total: int, stream: io.StringIO) -> None:
    assert drawn(total, stream) == ""


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["score", "x", "--model", "m"], "--model means nothing without --remote"),
        (["score", "x", "--keep-pictures"], "--keep-pictures means nothing without --remote"),
        (["compare", "x", "y", "--model", "m"], "--model means nothing without --remote"),
        (["rank", "x", "--model", "m"], "--model means nothing without --remote"),
        (["cull", "x", "--force"], "--force means nothing without --html"),
        (["score", "x", "--force"], "--force means nothing without --output or --map"),
        (["score", "x", "--remote", "u", "--package", "p"], "--remote means nothing beside --pack"),
        (["score", "x", "--threads", "1", "--remote", "u"], "--remote means nothing beside --thr"),
        (["score", "x", "--no-learn", "--admission", "all"], "nothing beside --no-learn"),
        (["score", "x", "--admission", "all", "--reference", "r"], "nothing beside --reference"),
        (["camera", "--video", "v", "--force"], "--force means nothing without --log or --best"),
        (["export", "c", "--out", "p", "--pictures", "3"], "nothing without --calibration"),
        (["export", "--out", "p", "--patterns", "f", "--prompt", "q"], "nothing without checkp"),
        (["calibrate", "l", "--package", "p", "--remote", "u"], "--package means nothing beside"),
        (["memory", "build", "l", "--prompt", "p"], "--prompt means nothing without --remote"),
        (["memory", "build", "l", "--cell-pixels", "9"], "nothing without --remote"),
        (["memory", "add", "m", "i", "--model", "x"], "--model means nothing without --remote"),
        (["memory", "add", "m", "i", "--keep-pictures"], "nothing without --remote"),
    ],
)
def test_options_that_mean_nothing_are_refused(
    command: list[str], said: str, engine: FakeEngine, capsys: Output
) -> None:
    assert cli.main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert "--help`" in line
    assert engine.calls == []


def test_threads_are_capped_at_the_cores_with_a_word(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    used: list[int] = []

    def open_onnx(_: object, __: object, ___: object, threads: int) -> None:
        used.append(threads)
        raise UsageError("enough was seen")

    monkeypatch.setattr(onnx, "open_onnx", open_onnx)
    cores = len(os.sched_getaffinity(0))
    for given in (["--threads", "10000"], ["--threads", "1"]):
        assert cli.main(["score", "none.jpg", *given]) == 2
    assert used == [cores, 1]
    assert caplog.text.count("10000 threads are asked for") == 1


@pytest.mark.parametrize("calibrated", [True, False])
def test_a_model_that_was_never_calibrated_is_told_of(
    calibrated: bool, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    engine = FakeEngine()
    if not calibrated:
        engine.model.calibration = UNCALIBRATED
    monkeypatch.setattr(Engine, "open", lambda *_, **__: engine)
    assert cli.main(["score", "none.jpg"]) == 1
    assert ("warning: this model was never calibrated" in capsys.readouterr().err) is not calibrated


def test_a_mistyped_memory_is_not_made(tmp_path: Path, capsys: Output) -> None:
    nope = tmp_path / "nope"
    assert cli.main(["score", "a.jpg", "--memory", str(nope)]) == 2
    assert f"no directory {nope}; `meiqa memory create`" in capsys.readouterr().err
    assert not nope.exists()


def test_several_values_stand_behind_an_option(capsys: Output) -> None:
    for command in (["--budgets"], ["--budgets", "--photos"], ["--budgets", "5", "--", "x"]):
        assert cli.main(["bench", "budget", *command]) == 2
    assert "--budgets' requires an argument" in capsys.readouterr().err.splitlines()[0]
