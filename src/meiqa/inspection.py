"""What is inside an engine package, for `meiqa inspect`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from meiqa.engine.package import EnginePackage

__all__ = ["describe_package", "inspection_text"]


def describe_package(package: EnginePackage) -> dict[str, Any]:
    """Everything in the manifest that a person may ask about, and the size of each file."""
    manifest = package.manifest
    return {
        "path": str(package.path),
        "digest": package.digest,
        "architecture": manifest.architecture,
        "source": dict(manifest.source),
        "precision": manifest.precision,
        "prompt": manifest.prompt.name,
        "score_head": manifest.score_head,
        "image": asdict(manifest.image),
        "decoder": asdict(manifest.decoder),
        "files": {name: (package.path / name).stat().st_size for name in files_of(package)},
        "graphs": {
            name: {"file": graph.file, "inputs": graph.inputs, "outputs": graph.outputs}
            for name, graph in manifest.every_graph.items()
        },
        "engines": [asdict(engine) for engine in manifest.engines],
        "calibration": asdict(manifest.calibration),
        "report": dict(manifest.report),
        "patterns": manifest.patterns and asdict(manifest.patterns),
    }


def files_of(package: EnginePackage) -> list[str]:
    """The files of a package, but for the manifest and the engines, by name."""
    graphs = package.manifest.every_graph.values()
    return sorted({*package.manifest.files, *(file for graph in graphs for file in graph.files)})


def inspection_text(report: Mapping[str, Any]) -> str:
    """Lay out the report of `describe_package` for people."""
    image, decoder, files = report["image"], report["decoder"], report["files"]
    side, merge = image["patch_size"] * image["merge_size"], image["merge_size"]
    area = f"{image['min_pixels']} to {image['max_pixels']} pixels"
    lines = [
        _row("package", report["path"]),
        _row("digest", report["digest"]),
        _row("architecture", report["architecture"]),
        _row("source", f"{report['source']['name']} (sha256 {report['source']['sha256'][:16]}…)"),
        _row("precision", report["precision"]),
        _row("prompt", report["prompt"]),
        _row("score head", report["score_head"]),
        _row("image", f"{area}, a token for {side} x {side} ({merge} x {merge} patches)"),
        _row("decoder", ", ".join(f"{name} {value}" for name, value in decoder.items())),
        _row("size", f"{_megabytes(sum(files.values()))} in {len(files)} files"),
    ]
    lines += ["", "files", *(f"  {name:<24}{_megabytes(size)}" for name, size in files.items())]
    for name, graph in report["graphs"].items():
        lines += ["", f"{name} graph: {graph['file']}"]
        for direction in ("inputs", "outputs"):
            lines += [f"  {direction[:-1]:<7}{_port(*port)}" for port in graph[direction].items()]
    lines += ["", "TensorRT engines", *_engine_lines(report["engines"])]
    lines += ["", "calibration", *_tree(report["calibration"])]
    lines += ["", "verification", *_tree(report["report"])]
    if report["patterns"] is not None:
        told = ("count", "calibration", "report")
        lines += ["", "distortion patterns", *_tree({k: report["patterns"][k] for k in told})]
    return "\n".join(lines)


def _row(name: str, value: object) -> str:
    return f"{name:<16}{value}"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.2f} MB"


def _port(name: str, shape: Sequence[int | str]) -> str:
    return f"{name:<18}({', '.join(map(str, shape))})"


def _engine_lines(engines: Sequence[Mapping[str, Any]]) -> list[str]:
    if not engines:
        return ["  none; `meiqa build` makes them"]
    return [
        f"  {engine['graph']:<9}{engine['precision']:<6}compute capability "
        f"{engine['compute_capability']}, {engine['runtime']} {engine['version']}, "
        f"{_megabytes(engine['size_bytes'])}, built in {engine['build_s']:.0f} s"
        for engine in engines
    ]


def _tree(values: object, depth: int = 1) -> list[str]:
    """Nested values, one to a line; a list of records becomes a table."""
    indent = "  " * depth
    if not isinstance(values, Mapping):
        return [f"{indent}{_value(values)}"]
    lines = []
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            lines += [f"{indent}{name}", *_tree(value, depth + 1)]
        elif isinstance(value, list | tuple) and value and isinstance(value[0], Mapping):
            lines += [f"{indent}{name}", *(f"{indent}  {row}" for row in _table(value))]
        else:
            lines.append(f"{indent}{name:<18}{_value(value)}")
    return lines


def _table(records: Sequence[Mapping[str, object]]) -> list[str]:
    """Records under their names, in columns."""
    rows = [list(records[0]), *([_value(v) for v in record.values()] for record in records)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
