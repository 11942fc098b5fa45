"""`meiqa bulk`: more photos than one command scores in an hour, on Ray or without it."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from meiqa.cli import options as cli
from meiqa.cli.memory import sync_once
from meiqa.cli.options import Options, say
from meiqa.errors import UsageError
from meiqa.progress import Progress

if TYPE_CHECKING:
    from meiqa.batches import ScoreOptions
    from meiqa.parts import PartScorer, Report
    from meiqa.sources import Picture

HERE, _BAR = "none", 30


@cli.command()
@cli.argument("source", "SOURCE")
@cli.option(
    "--out OUT", "directory of the rows, on disk or in object storage", cli.path, required=True
)
@cli.format_option("parquet", "jsonl")
@cli.flag("--resume", "go on with OUT, and take in photos that are new", excludes="--force")
@cli.flag("--force", "begin OUT anew; only files that meiqa made there are removed")
@cli.option(
    "--address A",
    "a Ray that runs: auto or ray://HOST:PORT; local: one of this machine, for this run (default); "
    "none: this process alone, without Ray",
    default="local",
)
@cli.option("--workers MIN MAX", "of one core each (default: all cores)", cli.POSITIVE, nargs=2)
@cli.option("--id COLUMN", "of a table: the column that names photos", excludes="--by-content")
@cli.option(
    "--column C",
    "of a table: the column of paths or encoded photos (default: bytes, image, jpg, path, url or "
    "uri)",
)
@cli.flag(
    "--by-content",
    "tell photos apart by their files' bytes, which are read for that (default: path, size, time)",
)
@cli.flag("--hidden", "look into hidden folders, thumbnails and bins, too")
@cli.option(
    "--filter CONDITION", "write only rows such as 'score >= 3.5 and std < 0.4', and errors"
)
@cli.flag("--embedding", "write a column of embeddings (docs/priors.md)")
@cli.SELECTION
@cli.EFFORT
@cli.PACKAGE
@cli.memory_option("the embedded anchors alone")
@cli.option(
    "--hub URL",
    "sync --memory with this PostgreSQL database once, before the run (docs/hub.md)",
    needs="--memory",
)
@cli.HUB_DEVICE
def bulk_command(options: Options) -> int:
    """Score many photos into a directory of rows, on all cores or on a cluster.

    SOURCE is a folder, a glob, a list of paths or URIs (a .txt file, or - for standard input), a
    prefix or glob of s3://, gs:// or az://, parquet tables with a column of paths or encoded
    photos, or tars. Nothing is learned. See docs/bulk.md.
    """
    needed = ("parquet",) if options.address == HERE else ("ray", "--address none")
    with cli.optional_packages(*needed):
        from meiqa.batches import BatchScorer, Condition
        from meiqa.parts import BulkOutput, PartScorer
        from meiqa.sources import Source, pictures_of

        if options.address != HERE:
            import meiqa.ray  # noqa: F401
    if options.workers is not None:
        _refuse_workers(options)
    source = Source(options.source, options.id, options.column, options.by_content, options.hidden)
    condition = None if options.filter is None else Condition(options.filter)
    scoring = _scoring(options)
    model = cli.terms_unopened(options)
    terms = {**model, **_terms(options, scoring)}
    selection = cli.selection_of(options)
    output = BulkOutput(options.out, options.format)
    if options.hub is not None:
        sync_once(options)
    with output.held():
        output.begin(terms, resume=options.resume, force=options.force)

        def unplanned(tell: Callable[[str], None]) -> Iterator[Picture]:
            taken = selection.of(pictures_of(source, tell), lambda one: one.id)
            return output.unplanned(taken)

        grows = selection.is_open and options.source not in cli.STDIN
        if grows or not output.plans:
            with _tolerated(bool(output.plans)):
                say(f"{options.out}: new photos: {output.plan(unplanned(say))}")
        code = _score(PartScorer(output, BatchScorer(scoring, "bytes"), model, condition), options)
        if grows and not options.by_content:  # by which each file would be read once more
            with _tolerated(True):
                if more := sum(1 for _ in unplanned(lambda line: None)):
                    say(f"{more} photos came meanwhile; take them in: --resume")
    return code


@contextmanager
def _tolerated(planned: bool) -> Iterator[None]:
    """Where photos are planned already, say what kept their source from being listed again."""
    try:
        yield
    except UsageError as error:
        if not planned:
            raise
        say(f"warning: new photos were not looked for: {error}")


def _refuse_workers(options: Options) -> None:
    fewest, most = options.workers
    if options.address == HERE:
        raise UsageError("--workers means nothing beside --address none, which has one")
    if fewest > most:
        seen, allowed = f"{fewest} {most}", "the fewest, then the most"
        raise UsageError("--workers is no range", seen=seen, allowed=allowed)


def _score(scorer: PartScorer, options: Options) -> int:
    """Score the parts that are waiting, and tell what came of all; give the exit code."""
    output, workers = scorer.output, options.workers
    waiting, before = output.waiting(), output.report()
    began = time.monotonic()
    total = before.photos + sum(waiting.values())
    with Progress(total, done=before.photos) as progress:
        for report in _reports(scorer, list(waiting), options.address, workers):
            progress.advance(images=report.photos)
    report = output.report()
    sys.stdout.write(report_text(report))
    now = report.photos - before.photos
    speed = now / max(time.monotonic() - began, 1e-3)
    each_ms = 1e3 * (report.score_s - before.score_s) / max(now, 1)
    told = f", {speed:.3g} photos/s, {each_ms:.0f} ms of a worker each" if waiting else ""
    say(f"{options.out}: {report.photos} photos, {now} of them scored now{told}")
    return cli.EXIT_FAILURES if report.failed else 0


def _reports(
    scorer: PartScorer, parts: list[int], address: str, workers: tuple[int, int] | None
) -> Iterator[Report]:
    """Score parts here or on Ray."""
    if address == HERE:
        yield from map(scorer, parts)
    elif parts:
        from meiqa.ray import connected, mapped

        with connected(address):
            yield from mapped(scorer, parts, workers, ordered=False)


def report_text(report: Report) -> str:
    """Lay out what came of photos: counts, and a histogram of scores."""
    from meiqa.parts import BINS_PER_POINT

    counts = [f"{report.scored} scored"]
    if report.left_out:
        counts.append(f"{report.scored - report.left_out} of them written")
    if report.failed:
        kinds = ", ".join(f"{kind} {count}" for kind, count in report.failed.most_common())
        counts.append(f"{report.failed.total()} failed ({kinds})")
    lines, most = ["; ".join(counts)], max(report.histogram)
    for place, count in enumerate(report.histogram):
        low = 1 + place / BINS_PER_POINT
        bar = "#" * round(_BAR * count / max(most, 1))
        lines.append(f"  {low:.2f}-{low + 1 / BINS_PER_POINT:.2f} {count:>9} {bar}".rstrip())
    return "\n".join(lines) + "\n"


def _scoring(options: Options) -> ScoreOptions:
    """How photos are scored; paths are whole, since workers stand elsewhere."""
    from meiqa.batches import ScoreOptions

    package, memory = (
        None if path is None else os.path.abspath(path)
        for path in (options.package, options.memory)
    )
    return ScoreOptions(
        package, memory, budget_ms=options.budget_ms, k=options.k, embedding=options.embedding
    )


def _terms(options: Options, scoring: ScoreOptions) -> dict[str, Any]:
    """What rows depend on beside the model: options, and which photos are taken."""
    names = "source id column by_content filter shard sample limit"
    asked = {name: getattr(options, name) for name in names.split()}
    asked["source"] = options.source.rstrip("/") or "/"  # the same folder, as a shell completes it
    terms = {**asdict(scoring), **asked, "shard": options.shard and list(options.shard)}
    del terms["threads"]  # scores do not depend on it
    del terms["package"]  # its digest does
    return terms
