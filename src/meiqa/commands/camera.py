"""`meiqa camera`: a camera or a video is judged while it runs, in a terminal."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TextIO

from meiqa.commands.options import (
    add_no_verify,
    engine_of,
    milliseconds,
    offline_packages,
    positive_count,
    say,
)
from meiqa.errors import ImageError, OutputUnwritable, UsageError
from meiqa.formats import csv_rows, total_ms
from meiqa.types import Assessment, Budget

if TYPE_CHECKING:
    from meiqa.commands.options import Commands
    from meiqa.engine.pipeline import Engine
    from meiqa.serve.capture import CapturedFrame
    from meiqa.serve.guidance import Instruction
    from meiqa.serve.viewing import View

LOG_COLUMNS = (
    *("time_s", "kind", "score", "std", "ci95_low", "ci95_high", "word", "instruction"),
    *("motion", "brightness", "distortions", "summary", "total_ms", "dropped", "error"),
)
_FULL_MS = 2000.0
_BAR = 24


def add_commands(commands: Commands) -> None:
    """Add this command to the parser."""
    command = commands.add_parser("camera", help="judge a camera while it runs, in a terminal")
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--device", dest="camera", metavar="N", help="V4L2 camera: its number or its path"
    )
    source.add_argument("--video", metavar="FILE", help="a video file, played at its own speed")
    command.add_argument("--log", metavar="FILE", help="write a CSV line for each frame judged")
    command.add_argument("--best", metavar="FILE", help="keep the best shot as JPEG or PNG")
    command.add_argument("--seconds", type=seconds, metavar="N", help="stop after so long")
    command.add_argument(
        "--budget-ms",
        type=milliseconds,
        default=_FULL_MS,
        metavar="N",
        help="for a picture that is held still (default: 2000)",
    )
    command.add_argument("--package", metavar="DIR", help="engine package (default: the embedded)")
    command.add_argument("--memory", metavar="DIR", help="memory (default: the user's own)")
    command.add_argument(
        "--engine-device",
        dest="device",
        choices=("cpu", "cuda", "tensorrt"),
        default="cpu",
        help="what the model runs on",
    )
    command.add_argument("--threads", type=positive_count, metavar="N")
    add_no_verify(command)
    command.set_defaults(run=_camera)


def seconds(text: str) -> float:
    """Read a time limit."""
    return milliseconds(text)


def _camera(options: argparse.Namespace) -> int:
    from meiqa.serve.capture import Capture

    live = options.video is None
    source = options.video if not live else _device_path(options.camera)
    with offline_packages("camera"):
        capture = Capture(source, live=live)
    with _log(options.log) as write, engine_of(options) as engine:
        run = _Run(engine, options.budget_ms, write, capture.rate_hz)
        with suppress(KeyboardInterrupt):
            run.warm_up()
            with capture:
                for frame in capture:
                    if options.seconds is not None and frame.at_s >= options.seconds:
                        break
                    run.judge(frame)
        run.finish()
    if options.best is not None:
        run.save_best(options.best)
    return 0


def _device_path(device: str) -> str:
    return f"/dev/video{device}" if device.isdigit() else device


@contextmanager
def _log(path: str | None) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Open the log; what it gives writes a row, and hands it to the disk at once."""
    if path is None:
        yield lambda row: None
        return
    try:
        file = open(path, "w", encoding="utf-8", newline="")  # noqa: SIM115 - closed below
    except OSError as error:
        raise OutputUnwritable(f"{path} can't be written", seen=error.strerror) from None
    with file:
        rows = csv_rows(file, LOG_COLUMNS)

        def write(row: dict[str, Any]) -> None:
            rows.writerow(row)
            file.flush()

        yield write


@dataclass
class _Run:
    """One camera from start to stop."""

    engine: Engine
    full_ms: float
    write: Callable[[dict[str, Any]], None]
    rate_hz: float | None
    judged: int = 0
    failed: int = 0
    dropped: int = 0
    lines: _Overlay = field(default_factory=lambda: _Overlay(sys.stderr))
    best: tuple[float, Any] | None = None

    def __post_init__(self) -> None:
        from meiqa.serve.viewing import Viewing

        self._viewing = Viewing(self.rate_hz)
        self._began_s: float | None = None
        self._shown: Assessment | None = None

    def warm_up(self) -> None:
        """Let the engine compile and measure what it has to before the first frame comes."""
        import numpy as np

        blank = np.full((480, 640, 3), 127, np.uint8)
        self.engine.score(blank, budget=Budget(ms=self.full_ms), learn=False)

    def judge(self, frame: CapturedFrame) -> None:
        """Assess a frame, show what came of it, and note it down."""
        from meiqa.serve.viewing import FAST_NEIGHBOURS

        now_s = time.monotonic()
        if self._began_s is None:
            self._began_s = now_s
        self.dropped = frame.dropped
        view = self._viewing.look(frame.pixels, now_s)
        full = view.kind == "full"
        try:
            found = self.engine.score(
                frame.pixels,
                budget=Budget(ms=self.full_ms if full else view.budget_ms),
                k=None if full else FAST_NEIGHBOURS,
                learn=False,
            )
        except ImageError as error:
            self.failed += 1
            self.write({"time_s": f"{frame.at_s:.3f}", "error": error, "dropped": frame.dropped})
            return
        instruction = self._viewing.advise(view, found, time.monotonic())
        self.judged += 1
        if self.best is None or found.score > self.best[0]:
            self.best = found.score, frame.pixels
        if full or not self._viewing.stands:
            self._shown = found
        self.lines.show(self._shown or found, instruction, self.rate())
        self.write(_row(frame, view, found, instruction))

    def rate(self) -> float:
        """Frames judged in a second, on average."""
        if self._began_s is None:
            return 0.0
        return self.judged / max(1e-3, time.monotonic() - self._began_s)

    def finish(self) -> None:
        """Say how it went."""
        self.lines.clear()
        best = "" if self.best is None else f", the best {self.best[0]:.2f}"
        failed = f", {self.failed} could not be judged" if self.failed else ""
        say(
            f"{self.judged} frames judged, {self.rate():.1f} a second, "
            f"{self.dropped} dropped{failed}{best}"
        )

    def save_best(self, path: str) -> None:
        """Write the best shot.

        Raises:
            OutputUnwritable, UsageError: it can't be written, or there is none.
        """
        from PIL import Image

        if self.best is None:
            raise UsageError("no frame was judged, so there is no best shot")
        try:
            Image.fromarray(self.best[1]).save(path, quality=95)
        except (OSError, ValueError) as error:
            raise OutputUnwritable(f"{path} can't be written", seen=error) from None


class _Overlay:
    """One line of a terminal that is written again and again; elsewhere nothing."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._on = stream.isatty()

    def show(self, found: Assessment, instruction: Instruction, rate_hz: float) -> None:
        self._put(
            f"{found.score:.2f} ± {found.std:.2f} {scale(found)} {found.word:<9}  "
            f"{instruction.text} ({instruction.reason})  {rate_hz:.1f}/s"
        )

    def clear(self) -> None:
        self._put("")

    def _put(self, line: str) -> None:
        if self._on:
            self._stream.write(f"\r\x1b[K\x1b[?7l{line}\x1b[?7h")  # a long line is cut, not wrapped
            self._stream.flush()


def scale(found: Assessment) -> str:
    """Draw a score and its interval on the scale from 1 to 5."""

    def place(score: float) -> int:
        return round((_BAR - 1) * (min(5.0, max(1.0, score)) - 1) / 4)

    low, at, high = map(place, (found.ci95[0], found.score, found.ci95[1]))
    return "".join("█" if i == at else "─" if low <= i <= high else "·" for i in range(_BAR))


def _row(
    frame: CapturedFrame, view: View, found: Assessment, instruction: Instruction
) -> dict[str, Any]:
    return {
        "time_s": f"{frame.at_s:.3f}",
        "kind": view.kind,
        "score": f"{found.score:.4f}",
        "std": f"{found.std:.4f}",
        "ci95_low": f"{found.ci95[0]:.4f}",
        "ci95_high": f"{found.ci95[1]:.4f}",
        "word": found.word,
        "instruction": instruction.code,
        "motion": "" if view.motion is None else f"{view.motion:.2f}",
        "brightness": f"{view.glance.brightness:.1f}",
        "distortions": ";".join(each.kind for each in found.distortions),
        "summary": found.summary or "",
        "total_ms": f"{total_ms(found.timings_ms):.1f}",
        "dropped": frame.dropped,
    }
