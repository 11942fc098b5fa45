"""`meiqa rank`, `cull` and `compare`: photos are compared with each other as well."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from meiqa.cli import options as cli
from meiqa.cli.options import Options
from meiqa.formats import write_comparison, write_set
from meiqa.outputs import PAGE, STDOUT, disk_errors, open_output
from meiqa.progress import Progress
from meiqa.types import Culling, Ranking

if TYPE_CHECKING:
    from meiqa.engine.engine import Engine

_SET = cli.together(
    cli.PATHS,
    cli.format_option("text", "json", "csv"),
    cli.option("--html FILE", "write a page with thumbnails, scores and intervals, too", cli.path),
    cli.force_option(needs="--html"),
    cli.EFFORT,
    cli.EXCLUDE_ABOVE,
    cli.engine_options(),
    cli.REMOTE,
)


@cli.command()
@cli.option(
    "--rivals N",
    "photos of the set that each is compared with, an even number",
    cli.COUNT,
    default=4,
)
@_SET
def rank_command(options: Options) -> int:
    """Put photos in order, best first, by comparing them with each other, too.

    A PATH is a directory for the photos in and below it, a photo, or - for standard input. A RAW
    file and the JPEG or HEIC of the same name are one photo.
    """
    return _judge_set(options, lambda engine: engine.rank, Ranking(()), rivals=options.rivals)


@cli.command()
@cli.option(
    "--alike C",
    "mean likeness of what they show from which on photos belong together (default: 0.55; up to 1; "
    "higher: more and smaller groups)",
    cli.number(0, 1, above=True),
)
@_SET
def cull_command(options: Options) -> int:
    """Group near-identical shots, and mark the best of each group.

    A PATH is a directory for the photos in and below it, a photo, or - for standard input. A RAW
    file and the JPEG or HEIC of the same name are one photo.
    """
    asked = {} if options.alike is None else {"alike": options.alike}
    return _judge_set(options, lambda engine: engine.cull, Culling(()), **asked)


def _judge_set(
    options: Options,
    judging: Callable[[Engine], Callable[..., Ranking | Culling]],
    result: Ranking | Culling,
    **settings: Any,
) -> int:
    """Judge the photos that were named, each once, and report them; `result` is that of none."""
    photos, failures = cli.photos_of(options)
    photos = list(dict.fromkeys(photos))  # no photo is to be its own rival
    page = options.html and open_output(options.html, PAGE, force=options.force, inputs=photos)
    with page or nullcontext() as file:
        if photos:
            given = cli.sources(photos)
            with cli.engine_of(options) as engine, Progress(len(photos)) as progress:
                result = judging(engine)(
                    given,
                    budget=cli.budget_of(options),
                    k=options.k,
                    on_photo=progress.advance,
                    **settings,
                )
        result = replace(result, failures=(*failures, *result.failures))
        if options.html not in STDOUT:
            write_set(result, options.format, sys.stdout)
        if file is not None:
            from meiqa.report import write_page

            with disk_errors(options.html):
                write_page(result, file)
    if result.degraded:
        cli.say(f"note: {'; '.join(result.degraded)}")
    reasons = [failure.to_dict() for failure in result.failures]
    return cli.report_failures(reasons, len(photos) + len(failures))


@cli.command()
@cli.argument("first", "A")
@cli.argument("second", "B")
@cli.format_option("text", "json", "jsonl", "csv")
@cli.RAW
@cli.BUDGET
@cli.engine_options()
@cli.REMOTE
def compare_command(options: Options) -> int:
    """Tell which of two photos looks better, and with what probability."""
    first, second = cli.sources(cli.as_asked([options.first, options.second], options))
    with cli.engine_of(options) as engine:
        compared = engine.compare(first, second, budget=cli.budget_of(options))
    write_comparison(compared, options.format, sys.stdout)
    return 0
