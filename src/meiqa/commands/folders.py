"""`meiqa score … --output FILE`: results of any number of photos, in a file that can be resumed."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from meiqa.commands.options import budget_of, engine_of, file_to_write, report_failures, say
from meiqa.errors import UsageError
from meiqa.types import Failure

if TYPE_CHECKING:
    from meiqa.engine.pipeline import Engine

WITHOUT_EFFECT = (
    *("paths", "format", "output", "resume", "threads", "verify", "learn", "run"),
    *("remote", "keep_pictures"),
)
"""Options that change no row, or which the file has in another way."""

__all__ = ["add_output", "refuse_unusable_output", "score_to_file"]


def add_output(command: argparse.ArgumentParser) -> None:
    """Add the options that name the file."""
    command.add_argument(
        "--output",
        type=file_to_write,
        metavar="FILE",
        help="write the rows (csv or jsonl) to a file, and leave the memory as it is",
    )
    command.add_argument(
        "--resume",
        action="store_true",
        help="go on with --output, if it is there: photos that have a row are not scored again",
    )


def refuse_unusable_output(options: argparse.Namespace) -> None:
    """Refuse options that do not go together.

    Raises:
        UsageError: they don't.
    """
    if options.output is None:
        if options.resume:
            raise UsageError("--resume goes on with a file", hint="name it: --output FILE")
        return
    if options.format not in ("csv", "jsonl"):
        raise UsageError(
            "--output takes one row a photo",
            seen=f"--format {options.format}",
            allowed="csv, jsonl",
        )
    if options.admission is not None:
        raise UsageError(
            "--admission says what is learned, and --output learns nothing",
            hint="leave one of them out",
        )


def score_to_file(
    options: argparse.Namespace, photos: Sequence[str], unreadable: Sequence[Failure]
) -> int:
    """Score the photos that have no row yet, each with the memory as it is now."""
    from meiqa.progress import Progress
    from meiqa.result_file import ResultFile

    photos = list(dict.fromkeys(photos))  # one that is named twice has one row
    with engine_of(options) as engine:
        snapshot = engine.memory.snapshot()
        found = {"anchors": snapshot.count_anchors, "cases": snapshot.count_contrast}
        with ResultFile(
            options.output,
            options.format,
            terms_of(engine, options),
            circumstances={"memory_holds": found},
            resume=options.resume,
        ) as file:
            before = len(file)
            if "memory_holds" in file.changed:
                say(f"warning: the memory has changed since {options.output} was begun")
            for failure in unreadable:
                if failure.path not in file:
                    file.write(failure)
            waiting = [photo for photo in photos if photo not in file]
            began = time.monotonic()
            results = engine.score_many(
                waiting, budget=budget_of(options), k=options.k, learn=False
            )
            with Progress(len(photos), sys.stderr, len(photos) - len(waiting)) as progress:
                for result in results:
                    file.write(result)
                    progress.advance()
            speed = len(waiting) / max(time.monotonic() - began, 1e-3)
            failures, rows = file.failures, len(file)
    code = report_failures(failures, rows)
    say(
        f"{options.output}: {rows} rows, {rows - before} of them new"
        + (f", {speed:.3g} images/s" if waiting else "")
    )
    return code


def terms_of(engine: Engine, options: argparse.Namespace) -> dict[str, Any]:
    """What a row depends on, beside the photo: package, calibration, and every option."""
    calibration = json.dumps(asdict(engine.package.manifest.calibration), sort_keys=True)
    chosen = {name: value for name, value in vars(options).items() if name not in WITHOUT_EFFECT}
    return {
        "package": engine.package.digest,
        "calibration": hashlib.sha256(calibration.encode()).hexdigest(),
        **{name: chosen[name] for name in sorted(chosen) if name != "package"},
    }
