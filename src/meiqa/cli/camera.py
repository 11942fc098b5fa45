"""`meiqa camera`: a camera or a video is judged while it runs, in a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from meiqa.cli import options as cli
from meiqa.cli.options import Options, say
from meiqa.errors import ImageError, UsageError
from meiqa.formats import cells_of, csv_line, csv_row
from meiqa.outputs import STDOUT, Kind, disk_errors, open_output, output_target
from meiqa.types import Assessment, Budget

if TYPE_CHECKING:
    from PIL import Image

    from meiqa.engine.engine import Engine
    from meiqa.serve.camera import CapturedFrame, Judged, Watcher

LOG_COLUMNS = (
    *("time_s", "kind", "score", "std", "ci95_low", "ci95_high", "word", "instruction"),
    *("change", "change_text", "level"),
    *("motion", "brightness", "distortions", "summary", "total_ms", "dropped", "error"),
)
LOG = Kind("log", b"time_s,kind,score,std,ci95_low,")
PHOTO = Kind("photo")
_BAR = 24
_MARKS = {"better": "▲", "worse": "▼", "steady": "=", "new": "·"}


@cli.command()
@cli.option(
    "--device N",
    "V4L2 camera: its number or its path",
    cli.path,
    name="camera",
    excludes="--video",
)
@cli.option("--video FILE", "a video file, played at its own speed", cli.path)
@cli.option("--log FILE", "write a CSV line for each frame judged", cli.path)
@cli.option("--best FILE", "keep the best shot as JPEG or PNG", cli.path)
@cli.force_option(needs="--log --best")
@cli.option("--seconds N", "stop after so long", cli.AMOUNT)
@cli.option("--fps N", "keep so many looks a second, with whatever fits", cli.AMOUNT)
@cli.option("--budget-ms N", "for a picture that is held still", cli.AMOUNT, default=2000.0)
@cli.HUB
@cli.engine_options(
    device=cli.option(
        "--engine-device",
        "what the model runs on",
        cli.DEVICES,
        name="device",
        default="cpu",
    )
)
def camera_command(options: Options) -> int:
    """Judge a camera or a video while it runs, and say what would make the picture better."""
    live = options.video is None
    source = options.camera if live else options.video
    if source is None:
        raise UsageError("a camera or a video is required", hint="--device N or --video FILE")
    with cli.optional_packages("camera"):
        from meiqa.serve.camera import CameraSession, Capture, Turns, Watcher

        number = live and source.isdigit()
        capture = Capture(f"/dev/video{source}" if number else source, live=live)
    outputs = {"force": options.force, "inputs": [] if live else [source]}
    format = options.best and _picture_format(options.best)
    if options.best and options.best not in STDOUT:
        output_target(options.best, PHOTO, **outputs)
    with (
        _log(options.log, outputs) as write,
        cli.engine_of(options, learn=options.hub is not None) as engine,
        cli.syncing(engine, options),
    ):
        neighbours = engine.model.calibration.neighbours
        session = CameraSession(capture.rate_hz, neighbours=neighbours)
        turns = None if options.fps is None else Turns(options.fps)
        watch = _Watch(Watcher(engine, session, options.budget_ms, turns), write, options.fps)
        with suppress(KeyboardInterrupt):
            _warm_up(engine, options.budget_ms)
            with capture:
                for frame in capture if turns is None else turns.pace(capture):
                    if options.seconds is not None and frame.at_s >= options.seconds:
                        break
                    watch.judge(frame)
        watch.finish()
    if options.best:
        if watch.best is None:
            raise UsageError("no frame was judged, so there is no best shot")
        with open_output(options.best, PHOTO, **outputs) as file, disk_errors(options.best):
            watch.best[2].save(file, format, quality=95)
    return 0


@contextmanager
def _log(path: str | None, outputs: dict[str, Any]) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Open the log; what it gives writes a row, and hands it to the disk at once."""
    if path is None:
        yield lambda row: None
        return
    stream: AbstractContextManager[TextIO] = nullcontext(sys.stdout)
    if path not in STDOUT:
        target = output_target(path, LOG, **outputs)
        with disk_errors(path):
            stream = target.open("w", encoding="utf-8", newline="")
    with stream as file:

        def write(row: dict[str, Any]) -> None:
            with disk_errors(file.name):
                file.write(csv_row(LOG_COLUMNS, row))
                file.flush()

        file.write(csv_line(LOG_COLUMNS))
        yield write


FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG"}


def _picture_format(path: str) -> str:
    """Give Pillow's name of the format that a file's name asks for.

    Raises:
        UsageError: there is none.
    """
    format = "JPEG" if path in STDOUT else FORMATS.get(Path(path).suffix.lower(), "")
    if not format:
        raise UsageError(f"--best {path} is no picture's name", allowed=", ".join(FORMATS))
    return format


def _warm_up(engine: Engine, full_ms: float) -> None:
    """Let the engine compile and measure what it has to before the first frame comes."""
    import numpy as np

    blank = np.full((480, 640, 3), 127, np.uint8)
    engine.score(blank, budget=Budget(ms=full_ms), learn=False)


class _Watch:
    """One camera from start to stop: what is shown of it, and noted down."""

    def __init__(
        self, watcher: Watcher, write: Callable[[dict[str, Any]], None], fps: float | None
    ) -> None:
        self.best: tuple[float, float, Image.Image] | None = None  # level, score, the frame
        self._watcher, self._write, self._fps = watcher, write, fps
        self._judged = self._failed = self._dropped = 0
        self._began_s: float | None = None
        self._shown: Assessment | None = None

    def judge(self, frame: CapturedFrame) -> None:
        """Assess a frame, show what came of it, and note it down."""
        from PIL import Image

        if self._began_s is None:
            self._began_s = time.monotonic()
        self._dropped = frame.dropped
        try:
            judged = self._watcher.judge(frame.pixels)
        except ImageError as error:
            self._failed += 1
            self._write({"time_s": f"{frame.at_s:.3f}", "error": error, "dropped": frame.dropped})
            return
        self._judged += 1
        found = judged.found
        if self.best is None or judged.level > self.best[0]:
            self.best = judged.level, found.score, Image.fromarray(frame.pixels)
        stands = self._watcher.session.stands
        if self._shown is None or judged.plan.kind == "full" or not stands:
            self._shown = found
        _put(f"{_line(self._shown, judged)}  {self._rate():.1f}/s")
        self._write(_row(frame, judged))

    def _rate(self) -> float:
        """Frames judged in a second, on average."""
        if self._began_s is None:
            return 0.0
        return self._judged / max(1e-3, time.monotonic() - self._began_s)

    def finish(self) -> None:
        """Say how it went."""
        _put("")
        best = "" if self.best is None else f", the best {self.best[1]:.2f}"
        wanted = "" if self._fps is None else f" of {self._fps:g} asked for"
        failed = f", {self._failed} could not be judged" if self._failed else ""
        say(
            f"{self._judged} frames judged, {self._rate():.1f} a second{wanted}, "
            f"{self._dropped} dropped{failed}{best}"
        )


def _put(line: str) -> None:
    """Write one line of a terminal again and again; a long one is cut, not wrapped."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K\x1b[?7l{line}\x1b[?7h")
        sys.stderr.flush()


def scale(found: Assessment) -> str:
    """Draw a score and its interval on the scale from 1 to 5."""

    def place(score: float) -> int:
        return round((_BAR - 1) * (min(5.0, max(1.0, score)) - 1) / 4)

    low, at, high = map(place, (found.ci95[0], found.score, found.ci95[1]))
    return "".join("█" if i == at else "─" if low <= i <= high else "·" for i in range(_BAR))


def _line(shown: Assessment, judged: Judged) -> str:
    """Tell what stands, what changed, and what to do."""
    change, instruction = judged.change, judged.instruction
    told = "" if change is None else f"{_MARKS[change.code]} {change.text}"
    return (
        f"{shown.score:.2f} ± {shown.std:.2f} {scale(shown)} {shown.word:<9}  {told:<35}  "
        f"{instruction.text} ({instruction.reason})"
    )


def _row(frame: CapturedFrame, judged: Judged) -> dict[str, Any]:
    plan, change = judged.plan, judged.change
    told = {"change": change.code, "change_text": change.text} if change else {}
    return {
        **cells_of(judged.found),
        **told,
        "time_s": f"{frame.at_s:.3f}",
        "kind": plan.kind,
        "instruction": judged.instruction.code,
        "level": f"{judged.level:.3f}" if change else "",
        "motion": "" if plan.motion is None else f"{plan.motion:.2f}",
        "brightness": f"{plan.stats.cells.mean():.1f}",
        "distortions": [each.kind for each in judged.found.distortions],
        "dropped": frame.dropped,
    }
