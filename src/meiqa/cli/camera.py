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
    from meiqa.serve.camera import CapturedFrame, FramePlan
    from meiqa.serve.guidance import Instruction

LOG_COLUMNS = (
    *("time_s", "kind", "score", "std", "ci95_low", "ci95_high", "word", "instruction"),
    *("motion", "brightness", "distortions", "summary", "total_ms", "dropped", "error"),
)
LOG = Kind("log", b"time_s,kind,score,std,ci95_low,")
PHOTO = Kind("photo")
_BAR = 24


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
        from meiqa.serve.camera import Capture

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
        watch = _Watch(engine, options.budget_ms, write, capture.rate_hz)
        with suppress(KeyboardInterrupt):
            watch.warm_up()
            with capture:
                for frame in capture:
                    if options.seconds is not None and frame.at_s >= options.seconds:
                        break
                    watch.judge(frame)
        watch.finish()
    if options.best:
        if watch.best is None:
            raise UsageError("no frame was judged, so there is no best shot")
        with open_output(options.best, PHOTO, **outputs) as file, disk_errors(options.best):
            watch.best[1].save(file, format, quality=95)
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


def _picture_format(path: str) -> str:
    """Give Pillow's name of the format that a file's name asks for.

    Raises:
        UsageError: there is none.
    """
    from PIL import Image

    Image.init()
    format = "JPEG" if path in STDOUT else Image.EXTENSION.get(Path(path).suffix.lower(), "")
    if format not in Image.SAVE:
        raise UsageError(f"--best {path} is no picture's name", allowed=".jpg, .png")
    return format


class _Watch:
    """One camera from start to stop."""

    def __init__(
        self,
        engine: Engine,
        full_ms: float,
        write: Callable[[dict[str, Any]], None],
        rate_hz: float | None,
    ) -> None:
        from meiqa.serve.camera import CameraSession

        self.best: tuple[float, Image.Image] | None = None
        self._engine, self._full_ms, self._write = engine, full_ms, write
        self._session = CameraSession(rate_hz, neighbours=engine.model.calibration.neighbours)
        self._judged = self._failed = self._dropped = 0
        self._began_s: float | None = None
        self._shown: Assessment | None = None

    def warm_up(self) -> None:
        """Let the engine compile and measure what it has to before the first frame comes."""
        import numpy as np

        blank = np.full((480, 640, 3), 127, np.uint8)
        self._engine.score(blank, budget=Budget(ms=self._full_ms), learn=False)

    def judge(self, frame: CapturedFrame) -> None:
        """Assess a frame, show what came of it, and note it down."""
        from PIL import Image

        now_s = time.monotonic()
        if self._began_s is None:
            self._began_s = now_s
        self._dropped = frame.dropped
        plan = self._session.plan(frame.pixels, now_s)
        full = plan.kind == "full"
        try:
            found = self._engine.score(
                frame.pixels,
                budget=Budget(ms=plan.budget_ms or self._full_ms),
                k=plan.k,
                learn=False,
            )
        except ImageError as error:
            self._failed += 1
            self._write({"time_s": f"{frame.at_s:.3f}", "error": error, "dropped": frame.dropped})
            return
        instruction = self._session.advise(plan, found, time.monotonic())
        self._judged += 1
        if self.best is None or found.score > self.best[0]:
            self.best = found.score, Image.fromarray(frame.pixels)
        if full or not self._session.stands:
            self._shown = found
        shown = self._shown or found
        _put(
            f"{shown.score:.2f} ± {shown.std:.2f} {scale(shown)} {shown.word:<9}  "
            f"{instruction.text} ({instruction.reason})  {self._rate():.1f}/s"
        )
        self._write(_row(frame, plan, found, instruction))

    def _rate(self) -> float:
        """Frames judged in a second, on average."""
        if self._began_s is None:
            return 0.0
        return self._judged / max(1e-3, time.monotonic() - self._began_s)

    def finish(self) -> None:
        """Say how it went."""
        _put("")
        best = "" if self.best is None else f", the best {self.best[0]:.2f}"
        failed = f", {self._failed} could not be judged" if self._failed else ""
        say(
            f"{self._judged} frames judged, {self._rate():.1f} a second, "
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


def _row(
    frame: CapturedFrame, plan: FramePlan, found: Assessment, instruction: Instruction
) -> dict[str, Any]:
    return {
        **cells_of(found),
        "time_s": f"{frame.at_s:.3f}",
        "kind": plan.kind,
        "instruction": instruction.code,
        "motion": "" if plan.motion is None else f"{plan.motion:.2f}",
        "brightness": f"{plan.stats.cells.mean():.1f}",
        "distortions": [each.kind for each in found.distortions],
        "dropped": frame.dropped,
    }
