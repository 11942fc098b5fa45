"""`meiqa eval`, `calibrate` and `bench …`: how good a model is, and how fast."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, TYPE_CHECKING, Any

from meiqa.cli import options as cli
from meiqa.cli.options import Options
from meiqa.errors import UsageError
from meiqa.formats import csv_line, csv_row, json_text
from meiqa.labels import LabelTable
from meiqa.locations import embedded_assets
from meiqa.outputs import PICTURE, STDOUT, Kind, marked_png, open_output
from meiqa.progress import Progress

if TYPE_CHECKING:
    from meiqa.evaluation.accuracy import Judged, ManyScorer

_METRICS = ("srcc", "plcc", "krcc", "rmse", "js", "effective_bins", "distinct", "tie_rate")
ROW_COLUMNS = ("path", "human", "score", "std", "ci95_low", "ci95_high", "initial_score")
ROWS = Kind("table of photos", ",".join(ROW_COLUMNS).encode())


@cli.command()
@cli.LABELS
@cli.option(
    "--budgets MS...",
    "judge under time limits, too",
    cli.AMOUNT,
    several=True,
    excludes="--ray",
)
@cli.RAY
@cli.option("--output FILE", "write a row for each photo judged, as CSV", cli.path)
@cli.option("--plots DIR", "draw the results into DIR", cli.path)
@cli.force_option(needs="--output --plots")
@cli.format_option("text", "json")
@cli.EFFORT
@cli.EXCLUDE_ABOVE
@cli.HEAD
@cli.engine_options(memory="the embedded anchors alone")
def eval_command(options: Options) -> int:
    """Measure the agreement with human scores."""
    _embedded_anchors(options)  # what this user's photos taught would change the figures
    with cli.optional_packages("eval"):
        from meiqa.engine.engine import Engine
        from meiqa.evaluation.accuracy import judge, sweep_budgets
    if options.plots is not None:
        with cli.optional_packages("plots"):
            import meiqa.evaluation.plots  # noqa: F401
    labels = cli.table_of(options)
    with ExitStack() as stack:
        engine = _engine(options, stack)
        with _rows_file(options, labels) as file, Progress(len(labels)) as progress:
            judged = judge(
                engine,
                labels,
                options.images,
                k=options.k,
                budget=cli.budget_of(options),
                on_result=progress.advance,
            )
            if file is not None:
                file.write(_rows(judged).encode())
        report = judged.report()
        if limits := options.budgets:
            assert isinstance(engine, Engine)  # Ray is excluded
            with Progress((1 + len(limits)) * len(labels)) as progress:
                report["budgets"] = sweep_budgets(
                    engine, labels, options.images, limits, on_result=progress.advance
                )
    if options.plots is not None:
        report["plots"] = _plots(options, judged, report)
    cli.print_report(report, options.format, _text)
    return cli.report_failures(report["failures"], len(labels))


def _engine(options: Options, stack: ExitStack) -> ManyScorer:
    """Open the engine that judges, or several of one core each on Ray."""
    if options.ray is None:
        return stack.enter_context(cli.engine_of(options))
    stack.enter_context(cli.cluster(options))
    from meiqa.ray import ClusterEngine

    return ClusterEngine(partial(cli.engine_of, options))


def _rows_file(options: Options, labels: LabelTable) -> AbstractContextManager[IO[bytes] | None]:
    """Open the file for rows, where one is asked for; never over what is read."""
    if options.output is None:
        return nullcontext()
    if str(options.output) in STDOUT:
        raise UsageError("the report goes to standard output", hint="name a file for the rows")
    inputs = (options.labels, *(Path(options.images, file) for file in labels.files))
    return open_output(options.output, ROWS, force=options.force, inputs=inputs)


def _rows(judged: Judged) -> str:
    """Lay out what people and the engine say of each photo."""
    lines = [csv_line(ROW_COLUMNS)]
    for one, human in zip(judged.assessments, judged.human.tolist(), strict=True):
        low, high = one.ci95
        values = {**one.to_dict(), "human": human, "ci95_low": low, "ci95_high": high}
        lines.append(csv_row(ROW_COLUMNS, values))
    return "".join(lines)


def _plots(options: Options, judged: Judged, report: Mapping[str, Any]) -> list[str]:
    """Draw what a report holds, each picture onto nothing or one of ours."""
    from meiqa.evaluation.plots import draw_all

    folder = Path(options.plots)
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="meiqa-plots-") as drawn:
        written = []
        for picture in draw_all(judged, report, Path(drawn)):
            path = folder / picture.name
            with open_output(path, PICTURE, force=options.force) as file:
                file.write(marked_png(picture.read_bytes()))
            written.append(str(path))
    return written


def _text(report: Mapping[str, Any]) -> str:
    from meiqa.evaluation.accuracy import budgets_text

    sections = [evaluation_text(report)]
    if "budgets" in report:
        sections.append(budgets_text(report["budgets"]))
    if "plots" in report:
        sections.append("\n".join(["Drawn:", *(f"  {path}" for path in report["plots"])]))
    return "\n\n".join(sections)


def evaluation_text(report: Mapping[str, Any]) -> str:
    """Lay out the report of `meiqa eval` as a table."""
    low, high = report["mos_range"]
    lines = [
        f"{report['n']} photos, K = {report['k']}, human scores {low:g} to {high:g} mapped to 1-5",
        "",
        "".join([" " * 8, *(f"{name:>15}" for name in _METRICS)]),
    ]
    for stage in ("initial", "fused"):
        cells = (f"{report[stage][name]:15.4f}" for name in _METRICS)
        lines.append(f"{stage:<8}{''.join(cells)}")
    intervals = (
        "{}: {:.4f} to {:.4f}".format(stage, *report[stage]["srcc_ci95"])
        for stage in ("initial", "fused")
    )
    others = ", ".join(
        f"{100 * row['observed']:.1f} % in {100 * row['nominal']:.0f} %"
        for row in report["reliability"]
    )
    pairs, agreement = report["tied_pairs"]["pairs"], report["tied_pairs"]["agreement"]
    tied = "no two photos that people tell apart have the same initial score"
    if pairs:
        tied = (
            f"of {pairs} pairs that people tell apart and the initial score does not, the fused "
            f"score orders {100 * agreement:.1f} % as people do"
        )
    lines += [
        "",
        f"95 % interval of the SRCC, {', '.join(intervals)}",
        f"{100 * report['coverage95']:.1f} % of the human scores lie within the 95 % interval; "
        f"{report['seconds_per_image']:.3f} s a photo",
        f"within other intervals: {others}",
        deviation_line(report["deviation"]),
        tied,
    ]
    return "\n".join(lines)


def deviation_line(told: Mapping[str, Any]) -> str:
    """Say how a photo's own deviation goes with its error."""
    if told["srcc"] is None:
        return "all photos have one deviation"
    quarters = ", ".join(f"{100 * share:.1f}" for share in told["coverage95"])
    return (
        f"the deviation goes with the error by an SRCC of {told['srcc']:.3f}; from the surest "
        f"quarter to the least sure, {quarters} % lie within the 95 % interval"
    )


@cli.command()
@cli.argument("labels", "LABELS.csv")
@cli.option("--images DIR", "where the images are", cli.path, required=True)
@cli.option("--package DIR", "its manifest is rewritten", cli.path, excludes="--remote")
@cli.option("--remote URL", "or a remote model: its memory's settings are rewritten")
@cli.option("--memory DIR", "anchors made by this model", cli.folder, required=True)
@cli.option("--limit N", "anchors to judge", cli.POSITIVE, default=500)
@cli.option(
    "--memory-share S", "of the memory's regression, 0-1 (default: fitted)", cli.number(0, 1)
)
@cli.MOS_RANGE
def calibrate_command(options: Options) -> int:
    """Fit the calibration of a model on its anchors, each judged against the others.

    LABELS.csv is the table that the memory was built from.
    """
    model = options.remote or (options.package and Path(options.package))
    if model is None:
        raise UsageError("a model is required", hint="--package DIR or --remote URL")
    with cli.optional_packages("eval"):
        from meiqa.evaluation.calibration import calibrate_package
        from meiqa.evaluation.scenes import SCENES

    labels = LabelTable.read(options.labels, mos_range=options.mos_range)
    memory, images = Path(options.memory), Path(options.images)
    judged = min(len(labels), options.limit)
    with Progress(judged + min(judged, SCENES)) as progress:
        fitted = calibrate_package(
            model,
            memory,
            labels,
            images,
            options.limit,
            options.memory_share,
            on_progress=progress.advance,
        )
    sys.stdout.write(json_text(fitted, indent=2) + "\n")
    return 0


bench_command = cli.Group("bench", help="Measure speed on this machine.", no_args_is_help=False)
MADE_PHOTOS = cli.option("--images DIR", "photographs (default: made ones)", cli.path)
BENCH = cli.together(
    cli.format_option("text", "json"), cli.engine_options(memory="the embedded anchors alone")
)


@bench_command.command("budget")
@cli.option(
    "--budgets MS...",
    "time limits",
    cli.AMOUNT,
    several=True,
    default=[50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0],
)
@cli.option("--photos N", "under each", cli.POSITIVE, default=100)
@MADE_PHOTOS
@BENCH
def bench_budget(options: Options) -> int:
    """Measure how late answers are under a time limit."""
    from meiqa.evaluation import speed

    found = speed.bench_budget(
        _engine_opener(options), options.budgets, photos=options.photos, images=_images(options)
    )
    cli.print_report(found, options.format, speed.budget_text)
    return 0


@bench_command.command("costs")
@cli.option("--photos N", "to measure on", cli.POSITIVE, default=20)
@MADE_PHOTOS
@BENCH
def bench_costs(options: Options) -> int:
    """Measure what stages cost here, and keep it for later processes."""
    from meiqa.engine.budget import costs_file
    from meiqa.evaluation.measuring import photographs_in

    _embedded_anchors(options)
    with cli.engine_of(options) as engine:
        costs = engine.calibrate_costs(photographs_in(_images(options), options.photos))
        kept = costs_file(engine.model.digest, options.device, options.threads)
    report = {"file": str(kept), **asdict(costs)}
    cli.print_report(report, options.format, _costs_text)
    return 0


def _costs_text(report: dict[str, Any]) -> str:
    lines = [
        f"{name:<16}{cost['expected']:10.3f}  ± {100 * cost['spread']:.0f} %"
        for name, cost in report.items()
        if name != "file"
    ]
    return "\n".join([*lines, report["file"]])


@bench_command.command("cold")
@cli.option("--runs N", "of each command", cli.POSITIVE, default=10)
@cli.option("--image PATH", "the photo (default: a made one)", cli.path)
@cli.NEIGHBOURS
@cli.format_option("text", "json")
def bench_cold(options: Options) -> int:
    """Measure a photo in a fresh process, beside its imports."""
    from meiqa.evaluation import speed

    image = None if options.image is None else Path(options.image)
    found = speed.bench_cold(options.runs, image=image, k=options.k)
    cli.print_report(found, options.format, speed.cold_text)
    return 0


@bench_command.command("device")
@cli.option("--rounds N", "of each kernel; the fastest counts", cli.POSITIVE, default=20)
@cli.PACKAGE
@cli.format_option("text", "json")
def bench_device(options: Options) -> int:
    """Measure comparisons by every kernel that this processor runs."""
    from meiqa.engine.package import EnginePackage
    from meiqa.evaluation import device

    package = EnginePackage.open(options.package or embedded_assets() / "package")
    cli.print_report(
        device.bench_device(package, options.rounds), options.format, device.device_text
    )
    return 0


SCENARIOS = ("SingleStream", "MultiStream", "Server", "Offline")


@bench_command.command("scenarios")
@cli.option("--scenarios NAME...", ", ".join(SCENARIOS), SCENARIOS, several=True, default=SCENARIOS)
@cli.option("--seconds S", "least duration of each; MLPerf asks for 600", cli.POSITIVE, default=60)
@cli.option("--photos N", "different ones", cli.POSITIVE, default=64)
@cli.option(
    "--server-rate N",
    "photos a second that arrive in Server (default: 40 % of what was seen)",
    cli.AMOUNT,
)
@cli.option(
    "--server-latency-ms MS", "how long 99 of 100 may take in Server", cli.AMOUNT, default=500.0
)
@MADE_PHOTOS
@BENCH
def bench_scenarios(options: Options) -> int:
    """Run MLPerf's scenarios, by MLCommons' LoadGen."""
    with cli.optional_packages("bench"):
        from meiqa.evaluation import speed

        found = speed.bench_scenarios(
            _engine_opener(options),
            options.scenarios,
            seconds=options.seconds,
            photos=options.photos,
            images=_images(options),
            server_rate=options.server_rate,
            server_latency_ms=options.server_latency_ms,
        )
    cli.print_report(found, options.format, speed.scenarios_text)
    return 0


def _engine_opener(options: Options) -> Callable[[], Any]:
    _embedded_anchors(options)
    return partial(cli.engine_of, options)


def _images(options: Options) -> Path | None:
    return None if options.images is None else Path(options.images)


def _embedded_anchors(options: Options) -> None:
    """Unless another is named, take the memory that is the same everywhere."""
    options.memory = options.memory or str(embedded_assets() / "memory")
