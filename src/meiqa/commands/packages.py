"""`meiqa export`, `build` and `inspect`: engine packages."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from meiqa.commands.options import (
    add_format,
    add_no_verify,
    count,
    offline_packages,
    positive_count,
    say,
)

if TYPE_CHECKING:
    from meiqa.commands.options import Commands


def add_commands(commands: Commands) -> None:
    """Add these commands to the parser."""
    _add_export(commands)
    _add_build(commands)
    _add_inspect(commands)


def _export(options: argparse.Namespace) -> int:
    with offline_packages("export"):
        from meiqa.export.hub import local_folder
        from meiqa.export.package import ExportOptions, export_package
        from meiqa.export.pictures import pictures_in
    from meiqa.engine.prompts import prompt_family

    photographs = options.calibration
    export_options = ExportOptions(
        precision=options.precision,
        prompt=None if options.prompt is None else prompt_family(options.prompt),
        pictures=[] if photographs is None else pictures_in(Path(photographs), options.pictures),
        max_pixels=options.max_pixels,
        sensitivity=options.sensitivity,
        key_pictures=options.key_pictures,
        score_head=options.score_head,
        say=say,
    )
    # Whoever ends the process by a signal gets the same tidy end as with Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    package = export_package(local_folder(options.checkpoint), Path(options.out), export_options)
    say(f"{package.path}: done; `meiqa inspect {package.path}` shows what is inside")
    return 0


def _build(options: argparse.Namespace) -> int:
    with offline_packages("rtx"):
        from meiqa.export.engines import build_engines
        from meiqa.export.profiles import Limits
    from meiqa.progress import StepProgress

    limits = Limits(options.max_batch, options.max_suffix, options.max_prefix, options.max_past)
    with offline_packages("rtx"), StepProgress(sys.stderr) as progress:
        made = build_engines(
            options.package,
            options.compute_capability,
            options.precision,
            limits,
            lambda step: progress.show(f"{step.engine}: {step.phase}", step.share),
        )
    for engine in made:
        size, seconds = engine.size_bytes / 1e6, engine.build_s
        say(f"{engine.file}: {size:.1f} MB in {seconds:.1f} s")
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from meiqa.engine.package import EnginePackage
    from meiqa.formats import json_text
    from meiqa.inspection import describe_package, inspection_text

    report = describe_package(EnginePackage.open(options.package, verify=options.verify))
    as_json = options.format == "json"
    sys.stdout.write((json_text(report, indent=2) if as_json else inspection_text(report)) + "\n")
    return 0


def _add_export(commands: Commands) -> None:
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
        "--pictures", type=positive_count, default=256, metavar="N", help="how many of them"
    )
    command.add_argument(
        "--no-sensitivity",
        dest="sensitivity",
        action="store_false",
        help="choose the precision of layers by rule instead of by measuring",
    )
    command.add_argument(
        "--key-pictures",
        type=count,
        metavar="N",
        help="how many of them are described, to fit the image key (default: 256, or 0 with a "
        "large model)",
    )
    command.add_argument(
        "--max-pixels", type=positive_count, metavar="N", help="area that the model is shown"
    )
    command.add_argument(
        "--score-head",
        choices=("text", "levels", "grm"),
        default="text",
        help="what makes the first score: the printed rating with the grade words, the expectation"
        " over these words, or their graded response, to be fitted (default: text)",
    )
    command.set_defaults(run=_export)


def _add_build(commands: Commands) -> None:
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
        command.add_argument(f"--max-{name}", type=positive_count, metavar="N", help=f"most {what}")
    command.set_defaults(run=_build)


def _add_inspect(commands: Commands) -> None:
    command = commands.add_parser("inspect", help="print what is inside an engine package")
    command.add_argument("package", metavar="PACKAGE")
    add_format(command, "text", "json")
    add_no_verify(command)
    command.set_defaults(run=_inspect)
