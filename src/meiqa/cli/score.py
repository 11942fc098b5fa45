"""`meiqa score`, `ask` and `demo`: photos are judged one by one."""

from __future__ import annotations

import importlib.util
import io
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import click

from meiqa.cli import options as cli
from meiqa.cli.options import Options, say
from meiqa.errors import UsageError, install_hint
from meiqa.formats import ResultWriter, write_answers
from meiqa.outputs import (
    PICTURE,
    ROWS,
    STDOUT,
    ResultFile,
    marked_png,
    open_output,
    output_target,
)
from meiqa.progress import Progress
from meiqa.types import Assessment, Failure

if TYPE_CHECKING:
    from PIL import Image

    from meiqa.engine.engine import Engine
    from meiqa.engine.images import ImageSource


@cli.command()
@cli.PATHS
@cli.format_option("text", "json", "jsonl", "csv")
@cli.option(
    "--output FILE",
    "write the rows (csv or jsonl) to a file, and leave the memory as it is",
    cli.path,
    excludes="--reference --map",
)
@cli.flag(
    "--resume",
    "go on with --output, if it is there: photos that have a row are not scored again",
    needs="--output",
    excludes="--force",
)
@cli.option(
    "--reference REF",
    "the photo as it should be, of the same shape; nothing is learned then",
    cli.path,
)
@cli.option(
    "--map FILE",
    "write the photo with a heat map of its distortions over it, as PNG; of one photo",
    cli.path,
)
@cli.SELECTION
@cli.sidecar_options()
@cli.force_option(needs="--output --map --xmp", also="; ratings given by hand, too")
@cli.EFFORT
@cli.flag("--no-learn", "leave the memory as it is")
@cli.flag("--no-detail", "leave out sharpness, motion and noise at full size, and JPEG quality")
@cli.flag(
    "--embedding",
    "give what the vision tower sees as a vector (docs/priors.md); in JSON",
    excludes="--remote",
)
@cli.option(
    "--admission",
    "remember photos that were reflected on (gated, the default), or all",
    ("gated", "all"),
    excludes="--no-learn --output --reference",
)
@cli.EXCLUDE_ABOVE
@cli.HEAD
@cli.engine_options()
@cli.REMOTE
@cli.flag(
    "--keep-pictures",
    "learn, for which the pictures of learned photos are kept, scaled down",
    needs="--remote",
    excludes="--no-learn --output --reference",
)
def score_command(options: Options) -> int:
    """Score photos, 1.00 to 5.00, higher is better.

    A PATH is a photo, a directory for the photos in and below it, or - for standard input. A RAW
    file and the JPEG or HEIC of the same name are one photo.
    """
    photos, unreadable = cli.photos_of(options)
    _require_sense(options, photos)
    way, scores = cli.way_out(options), dict[str, float]()
    if options.output is not None and options.output not in STDOUT:
        code = _score_to_file(options, photos, unreadable, scores)
    else:
        code = _score_to_stream(options, photos, unreadable, scores)
    if way is None:
        return code
    from meiqa.wayout import STARS, Verdict, stars_given

    stars = stars_given(options.stars or STARS, scores.values())
    verdicts = [Verdict(path, stars(score)) for path, score in scores.items()]
    return max(code, cli.take(way, verdicts, options))


def _score_to_stream(
    options: Options,
    photos: Sequence[str],
    unreadable: Sequence[Failure],
    scores: dict[str, float],
) -> int:
    """Score photos as they come and print what comes of them; give the exit code."""
    failures = [failure.to_dict() for failure in unreadable]
    learn = not options.no_learn and options.output is None
    named = [] if options.reference is None else [options.reference]
    reference = cli.as_asked(named, options)
    with ExitStack() as stack:
        picture = None
        if options.map is not None:
            inputs = [*photos, *reference]
            picture = stack.enter_context(
                open_output(options.map, PICTURE, force=options.force, inputs=inputs)
            )
        given = cli.sources([*photos, *reference])
        beside = given.pop() if reference else None
        engine = stack.enter_context(cli.engine_of(options, learn=learn)) if photos else None
        stream = io.StringIO() if options.map in STDOUT else sys.stdout
        writer = stack.enter_context(ResultWriter(options.format, stream))

        def write(result: Assessment | Failure) -> None:
            writer.write(result)
            if isinstance(result, Assessment):
                scores[result.path] = result.score

        for failure in unreadable:
            writer.write(failure)
        if engine is not None:
            failures += _score(engine, given, beside, options, write)
            if picture is not None and not failures:
                picture.write(_distortion_map(engine, given[0], beside))
    return cli.report_failures(failures, len(photos) + len(unreadable))


def _require_sense(options: Options, photos: Sequence[str]) -> None:
    """Refuse what does not go together."""
    if options.output is not None:
        if options.format not in ("csv", "jsonl"):
            seen = f"--format {options.format}"
            raise UsageError("--output takes one row a photo", seen=seen, allowed="csv, jsonl")
        if options.resume and options.output in STDOUT:
            raise UsageError("standard output can't be gone on with", hint="leave out --resume")
        if cli.STDIN & {*photos}:
            raise UsageError("--output has a row for each file, and standard input is none")
    if options.embedding and options.format not in ("json", "jsonl"):
        seen = f"--format {options.format}"
        raise UsageError("--embedding stands in JSON only", seen=seen, allowed="json, jsonl")
    if options.map is not None and len(photos) != 1:
        raise UsageError("--map is of one photo", seen=f"{len(photos)} photos")


def _score(
    engine: Engine,
    photos: Sequence[ImageSource],
    reference: ImageSource | None,
    options: Options,
    write: Callable[[Assessment | Failure], None],
    done: int = 0,
) -> list[dict[str, Any]]:
    """Judge photos and write what comes of them; give the failures, as `Failure.to_dict` does."""
    failures = []
    results = engine.score_many(
        photos,
        reference=reference,
        budget=cli.budget_of(options),
        k=options.k,
        learn=not options.no_learn and options.output is None,
        detail=not options.no_detail,
        embedding=options.embedding,
    )
    with Progress(done + len(photos), done=done) as progress:
        for result in results:
            progress.clear()
            write(result)
            progress.advance()
            if isinstance(result, Failure):  # not kept itself: its traceback holds the pixels
                failures.append(result.to_dict())
    return failures


def _distortion_map(engine: Engine, photo: ImageSource, reference: ImageSource | None) -> bytes:
    """A photo with the map of its distortions over it, as PNG."""
    from PIL import Image

    from meiqa.engine.images import load_pixels
    from meiqa.engine.patterns import painted

    pixels = load_pixels(photo).array
    strengths = engine.patterns(photo, reference).over(*pixels.shape[:2])
    file = io.BytesIO()
    Image.fromarray(painted(pixels, strengths)).save(file, "PNG")
    return marked_png(file.getvalue())


def _score_to_file(
    options: Options,
    photos: Sequence[str],
    unreadable: Sequence[Failure],
    scores: dict[str, float],
) -> int:
    """Score the photos that have no row yet, each with the memory as it is now."""
    photos = list(dict.fromkeys(photos))  # one that is named twice has one row
    target = output_target(options.output, ROWS, force=True, inputs=photos)
    with cli.engine_of(options) as engine:
        snapshot = engine.memory.snapshot()
        found = {"anchors": snapshot.count_anchors, "cases": snapshot.count_contrast}
        with ResultFile(
            target,
            options.format,
            _terms(engine, options),
            {"memory_holds": found},
            resume=options.resume,
            force=options.force,
        ) as file:
            before = len(file)
            if "memory_holds" in file.changed:
                say(f"warning: the memory has changed since {target} was begun")
            for failure in unreadable:
                if failure.path not in file:
                    file.write(failure)
            waiting = [photo for photo in photos if photo not in file]
            began = time.monotonic()
            _score(engine, waiting, None, options, file.write, done=len(photos) - len(waiting))
            speed = len(waiting) / max(time.monotonic() - began, 1e-3)
            failures, rows = file.failures, len(file)
            rated = ((photo, file.score_of(photo)) for photo in photos)
            scores.update((photo, score) for photo, score in rated if score is not None)
    code = cli.report_failures(failures, rows)
    told = f", {speed:.3g} images/s" if waiting else ""
    say(f"{options.output}: {rows} rows, {rows - before} of them new{told}")
    return code


def _terms(engine: Engine, options: Options) -> dict[str, Any]:
    """What a row depends on, beside the photo: package, calibration, and options."""
    from meiqa.engine.calibration import model_terms

    names = (
        "admission budget_ms device embedding exclude_above head k map memory model no_detail raw "
        "reference"
    )
    return {
        **model_terms(engine.model.digest, engine.model.calibration),
        **{name: getattr(options, name) for name in names.split()},
    }


# These lie in scikit-image's wheel; its others are fetched from the network on first use.
_FILES = ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg")


UNLIKELY = -7.0
"""Log-probability of an option, one in a thousand, below which shares among options mean little."""


def texts(given: str) -> tuple[str, ...]:
    """Read options between commas; spaces around them are dropped."""
    options = tuple(map(str.strip, given.split(",")))
    if not all(options) or len({*options}) < len(options):
        raise click.BadParameter(f"{given!r} holds an empty option, or one twice")
    return options


@cli.command()
@cli.argument("image", "IMAGE")
@cli.argument("questions", "QUESTION...", str, nargs=-1, required=True)
@cli.option("--options A,B,C", "how the reply may begin", texts, required=True)
@cli.option(
    "--second PHOTO",
    "shown behind IMAGE, for questions about two; may be given again",
    cli.path,
    multiple=True,
)
@cli.format_option("text", "json", "jsonl", "csv")
@cli.RAW
@cli.engine_options()
def ask_command(options: Options) -> int:
    """Ask a model about a photo: how probable is each option as the reply?

    The default model knows its own questions only; others need the package of a general model
    (docs/options.md).
    """
    image, *seconds = cli.sources(cli.as_asked([options.image, *options.second], options))
    with cli.engine_of(options) as engine:
        from meiqa.engine.asking import Question

        pairs: Sequence[ImageSource | None] = seconds or [None]
        asked = [Question(text, options.options, p) for text in options.questions for p in pairs]
        answers = engine.options_many(image, asked)
        write_answers(answers, options.format, sys.stdout)
    for answer in answers:
        if max(answer.logprobs.values()) < UNLIKELY:
            say(f"warning: the model would reply something else to {answer.question!r}")
    return 0


@cli.command()
@cli.EFFORT
@cli.engine_options(memory="a temporary one")
def demo_command(options: Options) -> int:
    """Score scikit-image's photographs, clean and degraded, with a memory of their own."""
    photos, reflections = demo_photos(), 0
    with ExitStack() as stack:
        if options.memory is None:  # the user's own memory is not for demonstrations
            options.memory = stack.enter_context(TemporaryDirectory(prefix="meiqa-demo-"))
        engine = stack.enter_context(cli.engine_of(options, learn=True))
        writer = stack.enter_context(ResultWriter("text", sys.stdout))
        for name, photo in photos:
            found = engine.score(photo, budget=cli.budget_of(options), k=options.k)
            reflections += found.reflection is not None
            writer.write(replace(found, path=name))
    sys.stdout.write(f"\n{len(photos)} photos, {reflections} reflections written\n")
    return 0


def demo_photos() -> list[tuple[str, Image.Image]]:
    """Give names and photographs: each one clean, then under each degradation.

    Raises:
        UsageError: scikit-image, which carries the photographs, is not installed.
    """
    import numpy as np
    from PIL import Image, ImageFilter

    def compressed(photo: Image.Image) -> Image.Image:
        photo.save(buffer := io.BytesIO(), "JPEG", quality=8)
        return Image.open(buffer)

    def noisy(photo: Image.Image) -> Image.Image:
        noise = np.random.default_rng(0).normal(0, 30, (photo.height, photo.width, 3))
        return Image.fromarray((np.asarray(photo) + noise).clip(0, 255).astype(np.uint8))

    degradations: dict[str, Callable[[Image.Image], Image.Image]] = {
        "clean": lambda photo: photo,
        "blurred": lambda photo: photo.filter(ImageFilter.GaussianBlur(3)),
        "JPEG quality 8": compressed,
        "noisy": noisy,
        "dark": lambda photo: photo.point(lambda value: value * 0.25),
    }
    # Found without importing it: only the files are needed.
    spec = importlib.util.find_spec("skimage")
    folder = Path(spec.origin).parent / "data" if spec and spec.origin else None
    if folder is None or not all((folder / file).is_file() for file in _FILES):
        raise UsageError(
            "scikit-image, whose photographs the demo scores, is not installed",
            hint=install_hint("demo"),
        )
    photos = []
    for file in _FILES:
        with Image.open(folder / file) as image:
            photo = image.convert("RGB")
        stem = Path(file).stem
        photos += [(f"{stem}, {name}", degrade(photo)) for name, degrade in degradations.items()]
    return photos
