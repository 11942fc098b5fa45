"""What commands share: options that check themselves, the engine they open, how they report."""

from __future__ import annotations

import gc
import math
import os
import shlex
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import reduce
from itertools import pairwise
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

import click

from meiqa.errors import DecodeError, OutputUnwritable, UsageError, install_hint, one_line
from meiqa.formats import failure_line, json_text
from meiqa.locations import embedded_assets
from meiqa.types import Budget, Failure

if TYPE_CHECKING:
    from meiqa.engine.calibration import Calibration
    from meiqa.engine.engine import Engine
    from meiqa.engine.images import NamedBytes
    from meiqa.folders import Selection
    from meiqa.journal import Journal
    from meiqa.labels import LabelTable
    from meiqa.memory import RetrievalPolicy
    from meiqa.wayout import Verdict, WayOut

EXIT_FAILURES = 1
"""Some photos could not be assessed, or something essential is missing."""
STDIN = frozenset({"-", "/dev/stdin", "/dev/fd/0", "/proc/self/fd/0"})
_LARGEST_PIPED_BYTES = 1 << 30

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class Options(SimpleNamespace):
    """The values of a command's options and arguments, by their names."""


class Option(click.Option):
    """An option that may mean nothing without one of others, or beside them.

    Args:
        needs: options, separated by spaces, one of which has to be given with it.
        excludes: options that can't be given with it.
        several: any number of values may stand behind it.
    """

    def __init__(
        self, names: Any, needs: str = "", excludes: str = "", several: bool = False, **more: Any
    ) -> None:
        super().__init__(names, **more)
        self.needs, self.excludes, self.several = needs.split(), excludes.split(), several

    def handle_parse_result(
        self, ctx: click.Context, opts: Mapping[str, Any], args: list[str]
    ) -> Any:
        """Refuse what means nothing, then read the value."""
        if self.name in opts:
            # Arguments that are missing stand there too, as None, () or a value of click's own.
            named = {
                n for n, v in opts.items() if isinstance(v, str | bool | list | tuple) and v != ()
            }
            given = {o for each in ctx.command.params if each.name in named for o in each.opts}
            if self.needs and not given & {*self.needs}:
                needed = " or ".join(self.needs)
                raise click.UsageError(f"{self.opts[0]} means nothing without {needed}", ctx)
            if beside := given & {*self.excludes}:
                raise click.UsageError(f"{self.opts[0]} means nothing beside {min(beside)}", ctx)
        return super().handle_parse_result(ctx, opts, args)


class Command(click.Command):
    """A command, which gets its `Options`; some may take several values: `--budgets 50 100`."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.short_help = (self.help or "").partition("\n")[0]  # click cuts others off

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Name such an option before each of its values, as click wants it."""
        options = [each for each in self.params if isinstance(each, Option) and each.several]
        several = {name for each in options for name in each.opts}
        spread, current = [], ""
        for token, behind in pairwise([*args, "--"]):
            if token in several and not behind.startswith("-"):
                current = token
            elif current and not token.startswith("-"):
                spread += [current, token]
            else:
                current = ""
                spread.append(token)
        try:
            return super().parse_args(ctx, spread)
        except click.UsageError as error:
            error.ctx = error.ctx or ctx  # by which the hint names the command
            raise

    def invoke(self, ctx: click.Context) -> Any:
        """Run it."""
        return self.callback(Options(**ctx.params)) if self.callback else None


class Group(click.Group):
    """A group of commands."""

    command_class = Command


def number(
    low: float = -math.inf, high: float = math.inf, *, above: bool = False
) -> Callable[[str], float]:
    """Make the type of finite numbers from `low` on, or above it, up to `high`."""
    allowed = "a finite number"
    if math.isfinite(low):
        allowed = f"a number {'above' if above else 'from'} {low:g}"
        allowed += f" up to {high:g}" if math.isfinite(high) else ""

    def read(text: str) -> float:
        with suppress(ValueError):
            value = float(text)
            if math.isfinite(value) and low <= value <= high and not (above and value == low):
                return value
        raise click.BadParameter(f"{text!r} is not {allowed}")

    return read


def path(text: str) -> str:
    """Read a path of anything, be it there or not."""
    if not text:
        raise click.BadParameter("'' is no path")
    return text


def folder(text: str) -> str:
    """Read the path of a directory, which is there."""
    if not os.path.isdir(path(text)):
        raise click.BadParameter(f"no directory {text}; `meiqa memory create` makes a new memory")
    return text


def shard(text: str) -> tuple[int, int]:
    """Read which share of how many, as 3/10."""
    with suppress(ValueError):
        number, count = map(int, text.split("/"))
        if 1 <= number <= count:
            return number, count
    raise click.BadParameter(f"{text!r} is not a share such as 3/10, from 1/10 to 10/10")


COUNT, POSITIVE = click.IntRange(min=0), click.IntRange(min=1)
AMOUNT = number(0, above=True)


def command() -> Callable[[Callable[[Options], int]], click.Command]:
    """Make a function a command; its docstring is the help."""
    return click.command(cls=Command)


def option(spec: str, help: str | None = None, type: Any = str, **settings: Any) -> Decorator:
    """Add an option.

    Args:
        spec: its name and what stands for its value, as "--k N", or just "--k" for choices.
        help: what it does; the default is shown behind it.
        type: of its value.
        settings: of `Option`; `name` is what its value is called.
    """
    flag, _, metavar = spec.partition(" ")
    names = [flag, *filter(None, [settings.pop("name", None)])]
    if isinstance(type, tuple):
        type = click.Choice(type)
    if settings.get("several"):
        settings["multiple"] = True
    if settings.get("default") is not None:
        settings.setdefault("show_default", True)
    return click.option(
        *names, cls=Option, help=help, type=type, metavar=metavar or None, **settings
    )


def flag(name: str, help: str, **settings: Any) -> Decorator:
    """Add an option without a value."""
    return click.option(name, cls=Option, is_flag=True, help=help, **settings)


def argument(
    name: str, metavar: str, type: Callable[[str], Any] = path, **settings: Any
) -> Decorator:
    """Add an argument: a path, unless another type reads it."""
    return click.argument(name, type=type, metavar=metavar, **settings)


def together(*options: Decorator) -> Decorator:
    """Add several options."""
    return lambda command: reduce(lambda made, each: each(made), reversed(options), command)


def format_option(*formats: str) -> Decorator:
    """Add --format; the first one is the default."""
    return option("--format", type=formats, default=formats[0])


def force_option(needs: str, also: str = "") -> Decorator:
    """Add --force, of these outputs."""
    return flag("--force", f"replace what is there, whatever it is{also}", needs=needs)


def stars(text: str) -> tuple[float, ...] | float:
    """Read the scores from which on photos have two to five stars, or the share that has five."""
    if text.startswith("top"):
        return number(0, 100, above=True)(text.removeprefix("top").removesuffix("%"))
    given = tuple(map(number(1, 5), text.split(",")))
    if len(given) != 4 or list(given) != sorted({*given}):
        raise click.BadParameter(f"{text!r} is neither four rising scores nor top and a percentage")
    return given


def sidecar_options(*ways: str, review: str = "") -> Decorator:
    """Add --xmp and what belongs to it; `ways` are the command's other ways out.

    `review` is one more option that --stars and --journal belong to.
    """
    needs = " ".join(["--xmp", *ways])
    return together(
        flag("--xmp", "write ratings into XMP sidecars; what they hold besides stays as it is"),
        option(
            "--sidecar",
            "names of sidecars: PHOTO.xmp (lightroom, the default) or PHOTO.JPG.xmp (darktable)",
            ("lightroom", "darktable"),
            needs="--xmp",
        ),
        option(
            "--stars S",
            "the scores from which on there are two, three, four and five stars (default: "
            "1.8,2.6,3.4,4.2); or top10: the best 10 % of the photos get five stars, and each star "
            "less goes to twice as many",
            stars,
            needs=f"--xmp {review}",
        ),
        flag("--dry-run", "only tell what would be done", needs=needs),
        option(
            "--journal FILE",
            "what `meiqa cull --undo` reads (default: a hidden file in the photos' folder)",
            path,
            needs=f"{needs} {review}",
        ),
    )


RAW = option(
    "--raw",
    "judge RAW files by their largest embedded preview, or develop them",
    ("preview", "develop"),
    default="preview",
)
PATHS = together(
    argument("paths", "PATH...", nargs=-1, required=True),
    flag("--hidden", "look into hidden folders, thumbnails and bins, too"),
    RAW,
)
SELECTION = together(
    option("--shard I/N", "one of N shares of the photos, for N processes or machines", shard),
    option("--sample N", "N photos as if drawn by lot, the same ones each time", POSITIVE),
    option("--limit N", "the first N photos", POSITIVE),
)
BUDGET = option("--budget-ms N", "time for each photo (default: no limit)", AMOUNT)
NEIGHBOURS = option(
    "--k N", "how many neighbours to compare with (default: the package's number)", COUNT
)
EFFORT = together(BUDGET, NEIGHBOURS)
PACKAGE = option("--package DIR", "engine package (default: the embedded)", path)
DEVICES = ("cpu", "cuda", "tensorrt")
DEVICE = option("--device", type=DEVICES, default="cpu")
NO_VERIFY = flag("--no-verify", "do not check digests on opening")
REMOTE = together(
    option(
        "--remote URL",
        "a model behind an OpenAI-compatible server in place of a package; photos are sent there, "
        "and --memory was made with it (docs/remote.md)",
        excludes="--package --device --threads --no-verify",
    ),
    option("--model NAME", "what that server calls it (default: the memory's)", needs="--remote"),
)
EXCLUDE_ABOVE = option(
    "--exclude-above C",
    "no neighbours whose layout has a cosine above C with the photo's: near-duplicates "
    "(default: 0.97; 1: only the photo itself)",
    number(),
)
HEAD = option(
    "--head",
    "what makes the first score: the printed rating with the grade words, the expectation over "
    "these words, or their graded response (default: the package's)",
    ("text", "levels", "grm"),
)
RAY = option(
    "--ray A",
    "spread the work over all cores of a Ray cluster: auto, local or ray://HOST:PORT "
    "(docs/bulk.md)",
    excludes="--remote",
)
MOS_RANGE = option(
    "--mos-range LO HI",
    "ends of the human scale (default: 0-1, 1-5 or 0-100, if the scores leave no doubt)",
    number(),
    nargs=2,
)
LABELS = together(
    argument("labels", "LABELS.csv"),
    option("--images DIR", "where the images are", path, required=True),
    option("--split S", "only the rows of this split"),
    option("--limit N", "N photos, spread over the table", POSITIVE),
    MOS_RANGE,
)


HUB_DEVICE = option(
    "--hub-device NAME", "what this device is called there (default: its host name)"
)
HUB = together(
    option(
        "--hub URL",
        "share the memory with other devices by a PostgreSQL database while this runs: what it "
        "remembers of photos is sent there, what others learned is fetched (docs/hub.md)",
    ),
    option("--sync-every S", "seconds between syncs", AMOUNT, default=30.0, needs="--hub"),
    HUB_DEVICE,
)


def memory_option(default: str) -> Decorator:
    """Add --memory, of a directory that is there; `default` says what is opened without."""
    return option("--memory DIR", f"memory (default: {default})", folder)


def engine_options(memory: str = "the user's own", device: Decorator = DEVICE) -> Decorator:
    """Add the options of an engine; `memory` is what is opened by default."""
    return together(
        PACKAGE,
        memory_option(memory),
        device,
        option("--threads N", "of the runtime (default, and at most: one for each core)", POSITIVE),
        NO_VERIFY,
    )


def budget_of(options: Options) -> Budget | None:
    """Give what may be spent on a photo."""
    return None if options.budget_ms is None else Budget(ms=options.budget_ms)


def table_of(options: Options) -> LabelTable:
    """Read the label table."""
    from meiqa.labels import LabelTable

    table = LabelTable.read(options.labels, split=options.split, mos_range=options.mos_range)
    if options.mos_range is None:
        low, high = table.mos_range
        say(f"{options.labels}: scores are taken to be from {low:g} to {high:g} (--mos-range)")
    for file, scores in table.contradictions().items():
        several = ", ".join(f"{score:g}" for score in scores)
        say(f"warning: {options.labels}: {file} has several scores: {several}")
    return table.spread(options.limit)


def engine_of(options: Options, *, learn: bool = False) -> Engine:
    """Open the engine that the options name: where the command line meets the engine."""
    head, remote = vars(options).get("head"), vars(options).get("remote")
    with _uncollected():
        from meiqa.engine.engine import Engine
        from meiqa.engine.package import EnginePackage

        if remote is not None:
            if options.memory is None or options.package is not None or options.device != "cpu":
                raise UsageError(
                    "a remote model takes the place of a package and its device",
                    hint="name the memory that was made with it, and no other: --memory DIR",
                )
            from meiqa.engine.remote import RemoteSettings

            calibration = RemoteSettings.of_memory(options.memory).calibration
            engine = Engine.connect(
                remote,
                options.memory,
                model=options.model,
                keep_pictures=learn and vars(options).get("keep_pictures", False),
                head=head,
                retrieval=_retrieval(options, calibration),
            )
        else:
            path = options.package or embedded_assets() / "package"
            package = EnginePackage.open(path, verify=not options.no_verify, head=head)
            engine = Engine.open(
                package,
                options.memory,
                device=options.device,
                threads=options.threads,
                learn=learn and (vars(options).get("admission") or "gated"),
                retrieval=_retrieval(options, package.manifest.calibration),
            )
    if not engine.model.calibration.is_fitted:
        say("warning: this model was never calibrated: scores and ± are raw; see meiqa calibrate")
    return engine


@contextmanager
def cluster(options: Options) -> Iterator[None]:
    """Connect to the Ray of --ray; the options' paths become whole, since workers stand elsewhere.

    Engines there have one thread, since there is one for each core.
    """
    with optional_packages("ray"):
        from meiqa.ray import connected

    for name in {"images", "package", "memory"} & vars(options).keys():
        if (given := getattr(options, name)) is not None:
            setattr(options, name, os.path.abspath(given))
    options.threads = vars(options).get("threads") or 1
    with connected(options.ray):
        yield


@contextmanager
def syncing(engine: Engine, options: Options) -> Iterator[None]:
    """Sync the engine's memory with the hub that is named, if one is, while this lasts."""
    if options.hub is None:
        yield
        return
    with optional_packages("hub"):
        from meiqa.memory.replica import syncing as synced
    with synced(engine.memory, options.hub, hub_device(options), options.sync_every):
        yield


def hub_device(options: Options) -> str:
    """Give what this device is called at a hub."""
    return options.hub_device or socket.gethostname()


def terms_unopened(options: Options) -> dict[str, str]:
    """Give the `model_terms` of the engine that the options name, which takes no opening."""
    from meiqa.engine.calibration import model_terms

    if vars(options).get("remote") is not None and options.memory is not None:
        from meiqa.engine.remote import RemoteSettings

        settings = RemoteSettings.of_memory(options.memory)
        return model_terms(settings.digest, settings.calibration)
    from meiqa.engine.package import EnginePackage

    package = EnginePackage.open(options.package or embedded_assets() / "package", verify=False)
    return model_terms(package.digest, package.manifest.calibration)


def _retrieval(options: Options, calibration: Calibration) -> RetrievalPolicy | None:
    """How neighbours are chosen, where the options say it otherwise than the calibration."""
    from meiqa.memory import RetrievalPolicy

    above = vars(options).get("exclude_above")
    if above is None:
        return None
    k, bins = calibration.neighbours, calibration.bins
    return RetrievalPolicy(k=k, bins=bins, exclude_above=above)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Exempt what is imported and opened here from garbage collection: a command needs it all.

    Looking through it while it is made and when the process ends takes a sixth of a cold score.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        if collecting:
            gc.enable()


def photos_of(options: Options) -> tuple[list[str], list[Failure]]:
    """Replace each directory by the photos in and below it, and say what was passed over."""
    from meiqa.folders import gather

    found = gather(options.paths, hidden=options.hidden, develop=options.raw == "develop")
    if found.passed_over:
        say(str(found))
    photos = list(selection_of(options).of(found.photos, os.path.abspath))
    return as_asked(photos, options), found.failures


def selection_of(options: Options) -> Selection:
    """Give which photos are taken; all of them where a command has no such options."""
    from meiqa.folders import Selection

    asked = vars(options)
    return Selection(asked.get("shard"), asked.get("sample"), asked.get("limit"))


def as_asked(paths: Sequence[str], options: Options) -> list[str]:
    """Give paths to be read as --raw says."""
    from meiqa.engine.images import Developed

    return [Developed(path) for path in paths] if options.raw == "develop" else [*paths]


def sources(paths: Sequence[str]) -> list[str | NamedBytes]:
    """Give what the engine reads photos from: paths, or for one of them standard input.

    Raises:
        UsageError: standard input is named twice.
    """
    from meiqa.engine.images import NamedBytes

    if sum(path in STDIN for path in paths) > 1:
        raise UsageError("standard input holds one photo", hint="name the others by their paths")
    given: list[str | NamedBytes] = []
    for path in paths:
        if path not in STDIN:
            given.append(path)
            continue
        data = sys.stdin.buffer.read(_LARGEST_PIPED_BYTES + 1)
        if len(data) > _LARGEST_PIPED_BYTES:
            raise DecodeError(f"{path} does not end", allowed="a photo of at most 1 GiB")
        given.append(NamedBytes(data, path))
    return given


@contextmanager
def optional_packages(extra: str, without: str = "") -> Iterator[None]:
    """Say how to install what the engine itself does without, or how to do without it."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise UsageError(
            "this command needs packages that are not installed",
            seen=f"no {error.name}",
            hint=install_hint(extra) + (without and f", or do without: {without}"),
        ) from error


def way_out(options: Options) -> WayOut | None:
    """Give what is to be done with photos, None if nothing is; refuse it before they are judged."""
    names = ("list", "copy_to", "link_to", "move_rejects_to")
    asked = {name: vars(options).get(name) for name in names}
    if not options.xmp and not any(asked.values()):
        return None
    from meiqa.journal import journals_in
    from meiqa.wayout import WayOut

    if STDIN & {*options.paths}:
        raise UsageError("standard input is no file that could be rated, listed or moved")
    sidecar: Any = (options.sidecar or "lightroom") if options.xmp else None
    way = WayOut(options.paths, sidecar, force=options.force, **asked)
    if not options.dry_run:
        if cut := [each for each in journals_in(way.base) if each.state == "planned"]:
            hint = "finish it: meiqa cull --resume FILE, or undo it: meiqa cull --undo FILE"
            raise UsageError(
                "an earlier run was cut short, or is at it", seen=cut[0].path, hint=hint
            )
        if options.journal is None and not os.access(way.base, os.W_OK):
            hint = "name a place for the journal: --journal FILE"
            raise OutputUnwritable(f"{way.base} cannot be written", hint=hint)
    return way


def say(line: str) -> None:
    """Tell whoever runs the command."""
    sys.stderr.write(f"meiqa: {line}\n")


def take(
    way: WayOut, verdicts: Sequence[Verdict], options: Options, tell: Callable[[str], None] = say
) -> int:
    """Do with photos what is to be done, or tell it; give the exit code."""
    from meiqa.journal import Journal, new_journal
    from meiqa.wayout import plan

    planned = plan(verdicts, way)
    for failure in planned.failures:
        tell(f"error: {failure_line(failure.path, str(failure.error))}")
    if planned.by_hand:
        tell(f"rated by somebody, and left as they are: {planned.by_hand}; --force takes them, too")
    code = EXIT_FAILURES if planned.failures else 0
    if options.dry_run:
        for action in planned.actions:
            tell(one_line(f"would {action}"))
    elif planned.actions:
        journal = Journal.begin(options.journal or new_journal(way.base), planned.actions)
        code = max(code, go_through(journal, "do", tell))
    else:
        tell("nothing is left to be done")
    return code


def go_through(
    journal: Journal, way: Literal["do", "undo"], tell: Callable[[str], None] = say
) -> int:
    """Do or undo a journal's actions, and tell of it; give the exit code."""
    errors = journal.do() if way == "do" else journal.undo()
    for error in errors:
        tell(f"error: {error}")
    told = f"{len(journal.actions) - len(errors)} of {len(journal.actions)} actions {way}ne"
    undo = f"; undo them: meiqa cull --undo {shlex.quote(str(journal.path))}" if way == "do" else ""
    rest = "; nothing else is left to be undone" if journal.state == "gone" else ""
    tell(one_line(f"{told}{rest}{undo}"))
    return EXIT_FAILURES if errors else 0


def print_report(report: Any, format: str, text: Callable[[Any], str]) -> None:
    """Print a report as JSON, or as text."""
    sys.stdout.write((json_text(report, indent=2) if format == "json" else text(report)) + "\n")


def report_failures(failures: Sequence[Mapping[str, Any]], attempted: int) -> int:
    """Say which photos could not be assessed; give the exit code."""
    for failure in failures:
        say(f"error: {failure_line(failure['path'], failure['error'])}")
    if failures and attempted > 1:
        say(f"{len(failures)} of {attempted} inputs could not be assessed")
    return EXIT_FAILURES if failures else 0
