"""`meiqa rank`, `cull` and `compare`: photos are compared with each other as well."""

from __future__ import annotations

import os
import secrets
import sys
import threading
import webbrowser
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from meiqa import __version__
from meiqa.cli import options as cli
from meiqa.cli.options import Options
from meiqa.errors import UsageError
from meiqa.formats import write_comparison, write_set
from meiqa.outputs import PAGE, STDOUT, disk_errors, open_output
from meiqa.progress import Progress
from meiqa.types import Culling, Failure, Ranking

if TYPE_CHECKING:
    from meiqa.engine.engine import Engine
    from meiqa.wayout import Verdict, WayOut

Judged = TypeVar("Judged", Ranking, Culling)
_WAYS = ("--list", "--copy-to", "--link-to", "--move-rejects-to")
_TERMS = ("alike", "budget_ms", "k", "exclude_above", "raw", "memory", "remote", "model")
"""Options on which it depends what a cull finds, beside the model."""
_SET = cli.together(
    cli.PATHS,
    cli.format_option("text", "json", "csv"),
    cli.option("--html FILE", "write a page with thumbnails, scores and intervals, too", cli.path),
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
@cli.force_option(needs="--html")
@_SET
def rank_command(options: Options) -> int:
    """Put photos in order, best first, by comparing them with each other, too.

    A PATH is a directory for the photos in and below it, a photo, or - for standard input. A RAW
    file and the JPEG or HEIC of the same name are one photo.
    """

    def judge(photos: Sequence[str]) -> Ranking:
        return _by_engine(options, photos, lambda engine: engine.rank, rivals=options.rivals)

    code, _ = _judge_set(options, cli.photos_of(options), judge, Ranking(()))
    return code


@cli.command()
@cli.option(
    "--alike C",
    "mean likeness of what they show from which on photos belong together (default: 0.55; up to 1; "
    "higher: more and smaller groups)",
    cli.number(0, 1, above=True),
)
@cli.option("--list FILE", "write the names of the best shots, one a line", cli.path)
@cli.option("--copy-to DIR", "copy the best shots, with files of the same name", cli.path)
@cli.option("--link-to DIR", "make symbolic links to them", cli.path)
@cli.option("--move-rejects-to DIR", "move the other shots of each group", cli.path)
@cli.flag(
    "--review",
    "go through the groups on a page of this machine, and decide before anything is done; "
    "what is decided outlives a kill, and the next --review goes on with it",
    excludes="--undo --resume",
)
@cli.flag("--no-browser", "do not open the page, only print its address", needs="--review")
@cli.sidecar_options(*_WAYS, review="--review")
@cli.flag(
    "--undo",
    "undo what the latest run did with the files of PATH, a folder or a journal",
    excludes=f"--resume --html --xmp --dry-run {' '.join(_WAYS)}",
)
@cli.flag(
    "--resume",
    "finish what a run that was cut short began; PATH is as for --undo",
    excludes=f"--undo --html --xmp --dry-run {' '.join(_WAYS)}",
)
@cli.force_option(needs=f"--html --xmp {' '.join(_WAYS)}", also="; ratings given by hand, too")
@_SET
def cull_command(options: Options) -> int:
    """Group near-identical shots, and mark the best of each group.

    Exposure brackets, focus stacks and panoramas are kept whole. A PATH is a directory for the
    photos in and below it, a photo, or - for standard input. A RAW file and the JPEG or HEIC of the
    same name are one photo. Nothing is deleted or overwritten by --xmp, --list, --copy-to,
    --link-to and --move-rejects-to; what they do is written into a journal first, and can be
    undone.
    """
    if options.undo or options.resume:
        return _go_back_to(options)
    way = cli.way_out(options)
    if options.review:
        return _review(options, way)
    photos = cli.photos_of(options)
    code, found = _judge_set(options, photos, partial(_cull, options), Culling(()))
    if way is None:
        return code
    from meiqa.wayout import STARS, verdicts_of

    verdicts = verdicts_of(found, options.stars or STARS)
    return max(code, cli.take(way, verdicts, options))


def _cull(options: Options, photos: Sequence[str]) -> Culling:
    asked = {} if options.alike is None else {"alike": options.alike}
    return _by_engine(options, photos, lambda engine: engine.cull, **asked)


def _review(options: Options, way: WayOut | None) -> int:
    """Cull photos, unless that was done before, and let somebody decide about them on a page."""
    from meiqa.decisions import NAME, Decisions
    from meiqa.wayout import STARS, common_folder

    if cli.STDIN & {*options.paths}:
        raise UsageError("standard input is no file that could be reviewed")
    with cli.optional_packages("serve"):
        from meiqa.serve.access import Settings
        from meiqa.serve.app import listen
        from meiqa.serve.review import Pictures, Review, run

    named = cli.photos_of(options)
    if not any(map(os.path.exists, named[0])):  # which is told, and nothing is made
        return _judge_set(options, named, partial(_cull, options), Culling(()))[0]
    terms = {"version": __version__, **cli.terms_unopened(options)}
    terms |= {name: vars(options)[name] for name in _TERMS}
    beside = options.journal and f"{options.journal}.review"
    with Decisions(beside or os.path.join(common_folder(options.paths), NAME)) as decisions:

        def judge(photos: Sequence[str]) -> Culling:
            found = decisions.found(photos, terms)
            if found is None:
                found = _cull(options, photos)
                decisions.remember(found, photos, terms)
            return found

        code, found = _judge_set(options, named, judge, Culling(()))
        if not found.groups:
            return code
        told: list[str] = []

        def finish(verdicts: list[Verdict]) -> list[str]:
            nonlocal code
            code = max(code, _carry_out(options, verdicts, told.append))
            return told

        will = {"will": way and str(way), "dry_run": options.dry_run}
        review = Review(found, decisions, options.stars or STARS, finish, will)
        pictures = Pictures(cli.as_asked([each.path for each in review.photos], options))
        token = secrets.token_urlsafe()
        with listen("127.0.0.1", 0, Settings()) as opened, ExitStack() as stack:
            opened.listen()  # so that a browser waits for its answer
            url = f"http://127.0.0.1:{opened.getsockname()[1]}/{token}/"
            if decisions.ratings:
                count = len(decisions.ratings)
                cli.say(f"going on from {decisions.path}; photos decided about: {count}")
            cli.say(f"decide on {url}; what is decided stays in {decisions.path}")
            if not options.no_browser:
                way_there = stack.enter_context(_leading_to(url, decisions.path.resolve().parent))
                threading.Thread(target=webbrowser.open, args=[way_there], daemon=True).start()
            try:
                run(review, pictures, token, opened)
                if not told:  # where Ctrl-C is ignored (a shell's `&`) it ends the server alone
                    raise KeyboardInterrupt
            except KeyboardInterrupt:
                if not told:
                    what = f"nothing was done; what was decided stays in {decisions.path}"
                    cli.say(f"{what}, and the same command goes on from there")
                raise
    return code


@contextmanager
def _leading_to(url: str, folder: Path) -> Iterator[str]:
    """Give the address of a file that only the user reads and that leads on to a URL.

    A browser's arguments are seen by everybody on the machine. The file lies with the photos:
    browsers in a sandbox don't see /tmp.
    """
    page = f'<!doctype html><meta http-equiv="refresh" content="0; url={url}">\n'
    made = partial(NamedTemporaryFile, dir=folder, prefix=".meiqa-review-", suffix=".html")
    with ExitStack() as stack:
        with disk_errors(folder):
            file = stack.enter_context(made("w"))
            file.write(page)
            file.flush()
        yield Path(file.name).as_uri()


def _carry_out(options: Options, verdicts: list[Verdict], note: Callable[[str], None]) -> int:
    """Do what was asked for with photos that were decided about, and tell of it here, too."""

    def tell(line: str) -> None:
        cli.say(line)
        note(line)

    kept = sum(each.rating >= 0 for each in verdicts)
    tell(f"{kept} photos kept, {len(verdicts) - kept} rejects")
    way = cli.way_out(options)  # since the last look at it much may have happened
    if way is None:
        ways = ", ".join(["--xmp", *_WAYS])
        tell(f"nothing is done with them; the same command with one of these does it: {ways}")
        return 0
    return cli.take(way, verdicts, options, tell)


def _go_back_to(options: Options) -> int:
    """Undo or finish what an earlier run began."""
    from meiqa.journal import Journal

    if len(options.paths) > 1:
        seen = f"{len(options.paths)} of them"
        raise UsageError("one folder or journal is undone or finished", seen=seen)
    way: Literal["do", "undo"] = "undo" if options.undo else "do"
    return cli.go_through(Journal.of(options.paths[0], way), way)


def _by_engine(
    options: Options,
    photos: Sequence[str],
    judging: Callable[[Engine], Callable[..., Judged]],
    **settings: Any,
) -> Judged:
    given = cli.sources(photos)
    with cli.engine_of(options) as engine, Progress(len(photos)) as progress:
        return judging(engine)(
            given,
            budget=cli.budget_of(options),
            k=options.k,
            on_photo=progress.advance,
            **settings,
        )


def _judge_set(
    options: Options,
    named: tuple[list[str], list[Failure]],
    judge: Callable[[Sequence[str]], Judged],
    result: Judged,
) -> tuple[int, Judged]:
    """Judge the photos of `cli.photos_of`, each once, and report them; `result` is that of none.

    Returns:
        The exit code, and what came of them.
    """
    unreadable: list[Failure]
    listed, unreadable = named
    photos = list(dict.fromkeys(listed))  # no photo is to be its own rival
    page = options.html and open_output(options.html, PAGE, force=options.force, inputs=photos)
    with page or nullcontext() as file:
        if photos:
            result = judge(photos)
        result = replace(result, failures=(*unreadable, *result.failures))
        if options.html not in STDOUT:
            write_set(result, options.format, sys.stdout)
        if file is not None:
            from meiqa.report import write_page

            with disk_errors(options.html):
                write_page(result, file)
    if result.degraded:
        cli.say(f"note: {'; '.join(result.degraded)}")
    reasons = [failure.to_dict() for failure in result.failures]
    return cli.report_failures(reasons, len(photos) + len(unreadable)), result


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
