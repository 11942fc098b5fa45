"""`meiqa export`, `build` and `inspect`: engine packages."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meiqa.cli import options as cli
from meiqa.cli.options import Options, say
from meiqa.errors import TENSORRT_EXTRA, UsageError
from meiqa.formats import tree_text
from meiqa.locations import embedded_assets
from meiqa.progress import Progress

if TYPE_CHECKING:
    from meiqa.engine.package import EnginePackage


@cli.command()
@cli.argument("checkpoint", "[CHECKPOINT]", required=False)
@cli.option("--out PACKAGE", "the engine package; must not exist", cli.path, required=True)
@cli.option(
    "--precision",
    type=("fp32", "fp16", "int8", "int4"),
    default="int8",
    needs="checkpoint",
)
@cli.option(
    "--prompt NAME",
    "meiqa, visualquality-r1, q-insight, evoquality, levels, q-sit, or a JSON file with one "
    "(default: what suits the checkpoint's family)",
    needs="checkpoint",
)
@cli.option("--calibration DIR", "photographs to calibrate and verify on", cli.path)
@cli.option("--pictures N", "how many of them", cli.POSITIVE, default=256, needs="--calibration")
@cli.flag(
    "--no-sensitivity",
    "choose the precision of layers by rule instead of by measuring",
    needs="checkpoint",
)
@cli.option(
    "--key-pictures N",
    "how many of them are described, to fit the image key (default: 256, or 0 with a large model)",
    cli.COUNT,
    needs="--calibration",
)
@cli.option("--max-pixels N", "area that the model is shown", cli.POSITIVE, needs="checkpoint")
@cli.option(
    "--score-head",
    "what makes the first score: the printed rating with the grade words, the expectation over "
    "these words, or their graded response, to be fitted",
    ("text", "levels", "grm"),
    default="text",
    needs="checkpoint",
)
@cli.option(
    "--largest-move M",
    "mean change of a grade (1-5) from PyTorch's that is accepted (default: 0.001 in fp32, 0.01 in "
    "fp16, 0.03 in int8, 0.06 in int4)",
    cli.number(0, 4),
    needs="checkpoint",
)
@cli.option(
    "--patterns CODEBOOK",
    "distortion patterns to add (default: patterns.safetensors beside the checkpoint's weights); "
    "without a checkpoint, to the package that is there",
    cli.path,
)
def export_command(options: Options) -> int:
    """Turn a checkpoint, a folder or a hub id, into an engine package."""
    with cli.optional_packages("export"):
        from meiqa.export.calibration import pictures_in
        from meiqa.export.checkpoint import local_folder
        from meiqa.export.package import ExportOptions, export_package

    from meiqa.engine.prompts import prompt_family

    if options.checkpoint is None and options.patterns is None:
        raise UsageError("missing CHECKPOINT", hint="see `meiqa export --help`")
    package, folder = Path(options.out), options.calibration
    pictures = [] if folder is None else pictures_in(Path(folder), options.pictures)
    # Whoever ends the process by a signal gets the same tidy end as with Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if options.checkpoint is not None:
        with Progress() as progress:
            chosen = ExportOptions(
                precision=options.precision,
                prompt=None if options.prompt is None else prompt_family(options.prompt),
                pictures=pictures,
                max_pixels=options.max_pixels,
                sensitivity=not options.no_sensitivity,
                key_pictures=options.key_pictures,
                score_head=options.score_head,
                largest_move=options.largest_move,
                say=progress.over(say),
                show=progress.show,
            )
            export_package(local_folder(options.checkpoint), package, chosen)
    if options.patterns is not None:
        from meiqa.export.patterns import add_patterns

        say("adding the distortion patterns")
        add_patterns(package, Path(options.patterns), pictures)
    say(f"{package}: done; `meiqa inspect {package}` shows what is inside")
    return 0


@cli.command()
@cli.argument("package", "PACKAGE")
@cli.option(
    "--compute-capability C",
    "of the GPUs that will run it, as 8.9; may be repeated (default: this machine's GPU)",
    multiple=True,
)
@cli.option("--precision", "default: the package's own", ("fp32", "fp16", "int8"))
@cli.option("--max-batch N", "most comparisons in one call", cli.POSITIVE)
@cli.option("--max-suffix N", "most tokens after a prefix in one call", cli.POSITIVE)
@cli.option("--max-prefix N", "most tokens of a prompt's opening with its picture", cli.POSITIVE)
@cli.option("--max-past N", "most written tokens, the question included", cli.POSITIVE)
def build_command(options: Options) -> int:
    """Compile a package's graphs with TensorRT."""
    with cli.optional_packages(TENSORRT_EXTRA):
        from meiqa.export.engines import Limits, build_engines

        limits = Limits(options.max_batch, options.max_suffix, options.max_prefix, options.max_past)
        with Progress() as progress:
            made = build_engines(
                options.package,
                options.compute_capability,
                options.precision,
                limits,
                lambda engine, phase, share: progress.show(f"{engine}: {phase}", share),
            )
    for engine in made:
        say(f"{engine.file}: {engine.size_bytes / 1e6:.1f} MB in {engine.build_s:.1f} s")
    return 0


@cli.command()
@cli.argument("package", "[PACKAGE]", required=False)
@cli.format_option("text", "json")
@cli.NO_VERIFY
def inspect_command(options: Options) -> int:
    """Print what is inside an engine package; by default the embedded one."""
    from meiqa.engine.package import EnginePackage

    path = options.package or embedded_assets() / "package"
    package = EnginePackage.open(path, verify=not options.no_verify)
    cli.print_report(describe_package(package), options.format, inspection_text)
    return 0


def describe_package(package: EnginePackage) -> dict[str, Any]:
    """Give all of the manifest that a person may ask about, and the size of each file."""
    manifest = package.manifest
    graphs = manifest.every_graph
    files = sorted({*manifest.files, *(file for graph in graphs.values() for file in graph.files)})
    return {
        "path": str(package.path),
        "digest": package.digest,
        **asdict(manifest),
        "prompt": manifest.prompt.name,
        "files": {name: (package.path / name).stat().st_size for name in files},
        "graphs": {
            name: {"file": graph.file, "inputs": graph.inputs, "outputs": graph.outputs}
            for name, graph in graphs.items()
        },
    }


def inspection_text(report: Mapping[str, Any]) -> str:
    """Lay out the report of `describe_package` for people."""
    files, patterns = report["files"], report["patterns"]
    shown = {
        **report,
        "size": f"{_megabytes(sum(files.values()))} in {len(files)} files",
        "files": {name: _megabytes(size) for name, size in files.items()},
        "engines": [_engine_row(engine) for engine in report["engines"]],
        "patterns": patterns and {k: patterns[k] for k in ("count", "calibration", "report")},
    }
    if not report["engines"]:
        shown["engines"] = "none; `meiqa build` makes them"
    return tree_text(shown)


def _engine_row(engine: Mapping[str, Any]) -> dict[str, Any]:
    names = ("graph", "precision", "compute_capability", "runtime", "version")
    size, seconds = _megabytes(engine["size_bytes"]), f"{engine['build_s']:.0f} s"
    return {**{name: engine[name] for name in names}, "size": size, "built in": seconds}


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.2f} MB"
