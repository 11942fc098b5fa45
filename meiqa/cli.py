"""The `meiqa` command.

Exit codes: 0 done; 1 some photos could not be assessed, or something essential is missing;
2 wrong usage, or a package, memory or device that cannot be used; 70 an unexpected error;
130 interrupted; 141 the reader of the output went away.

Nothing heavy is imported before a command needs it, so that `meiqa --help` is immediate.
"""

from __future__ import annotations

import argparse
import io
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

import meiqa
from meiqa.errors import (
    DecodeError,
    ImageError,
    MeiqaError,
    UsageError,
    one_line,
)
from meiqa.types import Assessment, Budget, Failure

if TYPE_CHECKING:
    from meiqa.engine.pipeline import Engine

    _Commands = argparse._SubParsersAction["_Parser"]

__all__ = ["main", "open_engine"]

_EXIT_FAILURES = 1
_EXIT_UNUSABLE = 2
_EXIT_UNEXPECTED = 70
_EXIT_INTERRUPTED = 130
_EXIT_BROKEN_PIPE = 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and give its exit code; errors become one line on stderr."""
    _accept_any_file_name(sys.stdout, sys.stderr)
    try:
        code = _run(argv)
        sys.stdout.flush()
        return code
    except MeiqaError as error:
        _say(f"error: {error}")
        return _EXIT_FAILURES if _concerns_the_photo(error) else _EXIT_UNUSABLE
    except BrokenPipeError:
        _drop_output()
        return _EXIT_BROKEN_PIPE
    except KeyboardInterrupt:
        _say("interrupted")
        return _EXIT_INTERRUPTED
    except Exception as error:
        if os.environ.get("MEIQA_DEBUG"):
            raise
        reason = one_line(f"{type(error).__name__}: {error}")
        _say(f"error: unexpected {reason}; MEIQA_DEBUG=1 shows where it happened")
        return _EXIT_UNEXPECTED


def _run(argv: Sequence[str] | None) -> int:
    try:
        options = _parser().parse_args(argv)
    except SystemExit:  # argparse has printed the help or the version
        return 0
    with warnings.catch_warnings():
        # Photos with odd metadata are common, and what matters of them becomes an error.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        code: int = options.run(options)
    return code


def open_engine(
    package: str | None,
    memory: str | None,
    *,
    device: str,
    threads: int | None,
    verify: bool,
    learn: bool,
) -> Engine:
    """Open the engine of a command; the one place where the command line meets the engine."""
    from meiqa.engine.pipeline import Engine

    return Engine.open(package, memory, device=device, threads=threads, verify=verify, learn=learn)


def _score(options: argparse.Namespace) -> int:
    from meiqa.formats import result_writer

    photos, failures = _photos_of(options.paths)
    attempted = len(photos) + len(failures)
    with ExitStack() as stack:
        engine = stack.enter_context(_engine_of(options, learn=options.learn)) if photos else None
        writer = stack.enter_context(result_writer(options.format, sys.stdout))
        for failure in failures:
            writer.write(failure)
        if engine is not None:
            failures += _score_photos(engine, photos, options, writer.write)
    return _report_failures([failure.to_dict() for failure in failures], attempted)


def _score_photos(
    engine: Engine,
    photos: Sequence[str],
    options: argparse.Namespace,
    write: Callable[[Assessment | Failure], None],
) -> list[Failure]:
    from meiqa.progress import Progress

    failures = []
    results = engine.score_many(
        photos, budget=_budget_of(options), k=options.k, learn=options.learn
    )
    with Progress(len(photos), sys.stderr) as progress:
        for result in results:
            progress.clear()
            write(result)
            progress.advance()
            if isinstance(result, Failure):
                failures.append(result)
    return failures


def _compare(options: argparse.Namespace) -> int:
    from meiqa.formats import write_comparison

    with _engine_of(options) as engine:
        write_comparison(engine.compare(options.first, options.second), options.format, sys.stdout)
    return 0


def _eval(options: argparse.Namespace) -> int:
    from meiqa.benchmarks.accuracy import LabelTable, evaluate
    from meiqa.formats import evaluation_text, json_text
    from meiqa.locations import embedded_assets
    from meiqa.progress import Progress

    if options.memory is None:  # what this user's photos taught would change the figures
        options.memory = str(embedded_assets() / "memory")
    labels = LabelTable.read(options.labels, split=options.split, mos_range=options.mos_range)
    count = min(options.limit or len(labels), len(labels))
    with _engine_of(options) as engine, Progress(count, sys.stderr) as progress:
        report = evaluate(
            engine,
            labels,
            options.images,
            limit=options.limit,
            k=options.k,
            budget=_budget_of(options),
            on_result=lambda _: progress.advance(),
        )
    as_json = options.format == "json"
    sys.stdout.write((json_text(report, indent=2) if as_json else evaluation_text(report)) + "\n")
    return _report_failures(report["failures"], count)


def _doctor(options: argparse.Namespace) -> int:
    from meiqa.doctor import examine, report_text
    from meiqa.formats import json_text

    report = examine(lambda: _engine_of(options), options.memory, verify=options.verify)
    as_json = options.format == "json"
    sys.stdout.write((json_text(report, indent=2) if as_json else report_text(report)) + "\n")
    return _EXIT_FAILURES if report["missing"] else 0


def _demo(options: argparse.Namespace) -> int:
    from meiqa.demo import demo_photos, show

    photos = demo_photos()
    with ExitStack() as stack:
        if options.memory is None:  # the user's own memory is not for demonstrations
            options.memory = stack.enter_context(TemporaryDirectory(prefix="meiqa-demo-"))
        engine = stack.enter_context(_engine_of(options, learn=True))
        show(engine, photos, _budget_of(options), options.k, sys.stdout)
    return 0


def _export(options: argparse.Namespace) -> int:
    with _offline_packages("export"):
        from meiqa.export.hub import local_folder
        from meiqa.export.package import ExportOptions, export_package, pictures_in
    from meiqa.engine.prompts import prompt_family

    photographs = options.calibration
    export_options = ExportOptions(
        precision=options.precision,
        prompt=None if options.prompt is None else prompt_family(options.prompt),
        pictures=[] if photographs is None else pictures_in(Path(photographs), options.pictures),
        max_pixels=options.max_pixels,
        sensitivity=options.sensitivity,
        key_pictures=options.key_pictures,
        say=_say,
    )
    package = export_package(local_folder(options.checkpoint), Path(options.out), export_options)
    _say(f"{package.path}: done; `meiqa inspect {package.path}` shows what is inside")
    return 0


def _build(options: argparse.Namespace) -> int:
    with _offline_packages("rtx"):
        from meiqa.export.engines import build_engines
        from meiqa.export.profiles import Limits
    from meiqa.progress import StepProgress

    limits = Limits(options.max_batch, options.max_suffix, options.max_prefix, options.max_past)
    with _offline_packages("rtx"), StepProgress(sys.stderr) as progress:
        made = build_engines(
            options.package,
            options.compute_capability,
            options.precision,
            limits,
            lambda step: progress.show(f"{step.engine}: {step.phase}", step.share),
        )
    for engine in made:
        size, seconds = engine.size_bytes / 1e6, engine.build_s
        _say(f"{engine.file}: {size:.1f} MB in {seconds:.1f} s")
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from meiqa.engine.package import EnginePackage
    from meiqa.formats import json_text
    from meiqa.inspection import describe_package, inspection_text

    report = describe_package(EnginePackage.open(options.package, verify=options.verify))
    as_json = options.format == "json"
    sys.stdout.write((json_text(report, indent=2) if as_json else inspection_text(report)) + "\n")
    return 0


@contextmanager
def _offline_packages(extra: str) -> Iterator[None]:
    """Say how to install what the engine itself does without."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise UsageError(
            "this command needs packages that are not installed",
            seen=f"no {error.name}",
            hint=f"pip install 'meiqa[{extra}]'",
        ) from error


def _engine_of(options: argparse.Namespace, *, learn: bool = False) -> Engine:
    return open_engine(
        options.package,
        options.memory,
        device=options.device,
        threads=options.threads,
        verify=options.verify,
        learn=learn,
    )


def _budget_of(options: argparse.Namespace) -> Budget | None:
    return None if options.budget_ms is None else Budget(ms=options.budget_ms)


def _photos_of(paths: Sequence[str]) -> tuple[list[str], list[Failure]]:
    """Replace each directory by the photos in and below it, in order of their paths."""
    photos: list[str] = []
    failures: list[Failure] = []
    for path in paths:
        if not os.path.isdir(path):
            photos.append(path)
            continue
        unreadable: list[Failure] = []
        found = _photos_below(path, unreadable)
        if not found and not unreadable:
            error = DecodeError(f"{path} holds no photos", hint="give a directory with images")
            unreadable.append(Failure(path, error))
        photos += found
        failures += unreadable
    return photos, failures


def _photos_below(directory: str, unreadable: list[Failure]) -> list[str]:
    from meiqa.engine.images import IMAGE_SUFFIXES

    def note(error: OSError) -> None:
        name = str(error.filename)
        unreadable.append(Failure(name, DecodeError(f"{name}: {error.strerror}")))

    return sorted(
        os.path.join(folder, file)
        for folder, _, files in os.walk(directory, onerror=note)
        for file in files
        if os.path.splitext(file)[1].lower() in IMAGE_SUFFIXES and not file.startswith(".")
    )


def _report_failures(failures: Sequence[Mapping[str, Any]], attempted: int) -> int:
    for failure in failures:
        path, error = one_line(failure["path"]), failure["error"]
        _say(f"error: {error}" if path in error else f"error: {path}: {error}")
    if failures and attempted > 1:
        _say(f"{len(failures)} of {attempted} inputs could not be assessed")
    return _EXIT_FAILURES if failures else 0


def _concerns_the_photo(error: MeiqaError) -> bool:
    return isinstance(error, ImageError)


def _say(line: str) -> None:
    sys.stderr.write(f"meiqa: {line}\n")


def _accept_any_file_name(*streams: TextIO) -> None:
    """Let names that the terminal's encoding lacks be printed with escapes."""
    for stream in streams:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _drop_output() -> None:
    """Point stdout at nothing, or Python would complain about the closed pipe while it exits."""
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message, hint=f"see `{self.prog} --help`")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="meiqa", description="Score the quality of photographs: 1.00 to 5.00.")
    parser.add_argument("--version", action="version", version=f"meiqa {meiqa.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_score(commands)
    _add_compare(commands)
    _add_eval(commands)
    _add_export(commands)
    _add_build(commands)
    _add_inspect(commands)
    _add_doctor(commands)
    _add_demo(commands)
    return parser


def _add_score(commands: _Commands) -> None:
    command = commands.add_parser("score", help="score photos")
    command.add_argument("paths", nargs="+", metavar="PATH", help="a photo, or a directory")
    _add_format(command, "text", "json", "jsonl", "csv")
    _add_effort(command)
    command.add_argument(
        "--no-learn", dest="learn", action="store_false", help="leave the memory as it is"
    )
    _add_engine(command)
    command.set_defaults(run=_score)


def _add_compare(commands: _Commands) -> None:
    command = commands.add_parser("compare", help="tell which of two photos looks better")
    command.add_argument("first", metavar="A")
    command.add_argument("second", metavar="B")
    _add_format(command, "text", "json", "jsonl", "csv")
    _add_engine(command)
    command.set_defaults(run=_compare)


def _add_eval(commands: _Commands) -> None:
    command = commands.add_parser("eval", help="measure the agreement with human scores")
    command.add_argument("labels", metavar="LABELS.csv", help="with an image and a mos column")
    command.add_argument("--images", required=True, metavar="DIR", help="where the images are")
    command.add_argument("--split", metavar="S", help="only the rows of this split")
    command.add_argument(
        "--limit", type=_positive_count, metavar="N", help="N photos, spread over the table"
    )
    command.add_argument(
        "--mos-range",
        nargs=2,
        type=float,
        metavar=("LO", "HI"),
        help="ends of the human scale (default: 0-1, 1-5 or 0-100, whichever holds all scores)",
    )
    _add_format(command, "text", "json")
    _add_effort(command)
    _add_engine(command, memory="the embedded anchors alone")
    command.set_defaults(run=_eval)


def _add_export(commands: _Commands) -> None:
    command = commands.add_parser("export", help="turn a checkpoint into an engine package")
    command.add_argument("checkpoint", metavar="CHECKPOINT", help="a folder or a hub id")
    command.add_argument("--out", required=True, metavar="PACKAGE")
    command.add_argument("--precision", choices=("fp32", "fp16", "int8", "int4"), default="int8")
    command.add_argument(
        "--prompt",
        metavar="NAME",
        help="meiqa, visualquality-r1, q-insight, evoquality, levels, or a JSON file with one "
        "(default: what suits the checkpoint's family)",
    )
    command.add_argument(
        "--calibration", metavar="DIR", help="photographs to calibrate and verify on"
    )
    command.add_argument(
        "--pictures", type=_positive_count, default=256, metavar="N", help="how many of them"
    )
    command.add_argument(
        "--no-sensitivity",
        dest="sensitivity",
        action="store_false",
        help="choose the precision of layers by rule instead of by measuring",
    )
    command.add_argument(
        "--key-pictures",
        type=_count,
        metavar="N",
        help="how many of them are described, to fit the image key (default: 256, or 0 with a "
        "large model)",
    )
    command.add_argument(
        "--max-pixels", type=_positive_count, metavar="N", help="area that the model is shown"
    )
    command.set_defaults(run=_export)


def _add_build(commands: _Commands) -> None:
    command = commands.add_parser("build", help="compile a package's graphs with TensorRT")
    command.add_argument("package", metavar="PACKAGE")
    command.add_argument(
        "--compute-capability",
        action="append",
        default=[],
        metavar="C",
        help="of the GPUs that will run it, as 8.9; may be repeated (default: this machine's GPU)",
    )
    command.add_argument(
        "--precision", choices=("fp32", "fp16", "int8"), help="default: the package's own"
    )
    for name, what in (
        ("batch", "comparisons in one call"),
        ("suffix", "tokens after a prefix in one call"),
        ("prefix", "tokens of a prompt's opening with its picture"),
        ("past", "written tokens, the question included"),
    ):
        command.add_argument(
            f"--max-{name}", type=_positive_count, metavar="N", help=f"most {what}"
        )
    command.set_defaults(run=_build)


def _add_inspect(commands: _Commands) -> None:
    command = commands.add_parser("inspect", help="print what is inside an engine package")
    command.add_argument("package", metavar="PACKAGE")
    _add_format(command, "text", "json")
    _add_no_verify(command)
    command.set_defaults(run=_inspect)


def _add_doctor(commands: _Commands) -> None:
    command = commands.add_parser("doctor", help="say what is installed and what is missing")
    _add_format(command, "text", "json")
    _add_engine(command)
    command.set_defaults(run=_doctor)


def _add_demo(commands: _Commands) -> None:
    command = commands.add_parser(
        "demo",
        help="score scikit-image's photographs, clean and degraded, with a memory of its own",
    )
    _add_effort(command)
    _add_engine(command, memory="a temporary one")
    command.set_defaults(run=_demo)


def _add_format(command: argparse.ArgumentParser, *formats: str) -> None:
    command.add_argument("--format", choices=formats, default=formats[0])


def _add_effort(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--budget-ms",
        type=_milliseconds,
        metavar="N",
        help="time for each photo (default: no limit)",
    )
    command.add_argument(
        "--k", type=_count, metavar="N", help="how many neighbours to compare with"
    )


def _add_engine(command: argparse.ArgumentParser, *, memory: str = "the user's own") -> None:
    command.add_argument("--package", metavar="DIR", help="engine package (default: the embedded)")
    command.add_argument("--memory", metavar="DIR", help=f"memory (default: {memory})")
    command.add_argument("--device", choices=("cpu", "cuda", "tensorrt"), default="cpu")
    command.add_argument("--threads", type=_positive_count, metavar="N")
    _add_no_verify(command)


def _add_no_verify(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--no-verify", dest="verify", action="store_false", help="do not check digests on opening"
    )


def _milliseconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of milliseconds")
    return value


def _count(text: str) -> int:
    return _whole_number(text, lowest=0)


def _positive_count(text: str) -> int:
    return _whole_number(text, lowest=1)


def _whole_number(text: str, *, lowest: int) -> int:
    complaint = f"{text!r} is not a whole number from {lowest} up"
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(complaint) from None
    if value < lowest:
        raise argparse.ArgumentTypeError(complaint)
    return value
