"""Count the house: its size, the way of a photo through it, and what stands in a circle.

    python -m benchmarks.house [--format json] [--photo PATH]

What is printed is read from the tree, and, for a photo, from a profiler's trace.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import sys
import threading
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).parents[1]
MOST_PARAMETERS = 7
MODEL_CALLS = {"describe", "grade"}
"""What only the one place that scores a photo asks of a model, and who makes anchors of photos."""
NOT_SCORING = {"engine/anchoring.py", "engine/budget.py", "engine/local.py", "engine/remote.py"}


def rooms() -> dict[str, str]:
    """Give the folders that the wheel is made of, by the package that each installs as."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages: dict[str, str] = project["tool"]["scikit-build"]["wheel"]["packages"]
    return packages


def modules() -> dict[str, Path]:
    """Give every module of the wheel."""
    found = {}
    for package, folder in rooms().items():
        for file in sorted((ROOT / folder).rglob("*.py")):
            inside = file.relative_to(ROOT / folder).with_suffix("").parts
            name = ".".join([*package.split("/"), *inside])
            found[name.removesuffix(".__init__")] = file
    return found


def imports_of(file: Path, known: set[str]) -> set[str]:
    """Give the modules of ours that a file imports, wherever in it, for types alone as well."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (inner & known) or {node.module}
    return found & known


def circles() -> list[list[str]]:
    """Find files that import each other, directly or by others (Tarjan 1972).

    The package's own face names what other modules hold, and is no part of any.
    """
    files = {name: file for name, file in modules().items() if name != "meiqa"}
    graph = {name: imports_of(file, {*files}) - {name} for name, file in files.items()}
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        order[name] = low[name] = len(order)
        stack.append(name)
        for other in sorted(graph[name]):
            if other not in order:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], order[other])
        if low[name] == order[name]:
            part = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(part) > 1:
                found.append(sorted(part))

    for name in graph:
        if name not in order:
            visit(name)
    return found


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Give every function of the wheel with its file."""
    for file in modules().values():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield str(file.relative_to(ROOT)), node


def long_signatures() -> list[str]:
    """Name the functions outside kernels/ with more parameters than are easily called."""
    named = []
    for file, node in functions():
        a = node.args
        each = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
        count = len([one for one in each if one.arg not in ("self", "cls")])
        if count > MOST_PARAMETERS and not file.startswith("kernels/"):
            named.append(f"{file}: {node.name} ({count})")
    return named


def scoring_places() -> list[str]:
    """Name the files that ask a model what only scoring a photo asks."""
    places = set()
    for file, node in functions():
        for call in ast.walk(node):
            called = isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)
            if called and call.func.attr in MODEL_CALLS and len(call.args) > 0:  # type: ignore[attr-defined]
                places.add(file)
    offline = {place for place in places if place.startswith("export/")}
    return sorted(places - offline - NOT_SCORING)


def trace_of(photo: Path | bytes, k: int) -> dict[str, Any]:
    """Score a photo on a warm engine, and count the files and functions that it runs through."""
    from meiqa.engine.engine import Engine
    from meiqa.locations import embedded_assets

    ours = {str(file.resolve()) for file in modules().values()}
    files: dict[str, int] = {}
    called: set[tuple[str, str]] = set()
    changes, last = 0, ""

    def note(frame: FrameType, event: str, argument: object) -> None:
        nonlocal changes, last
        if event != "call":
            return
        file = str(Path(frame.f_code.co_filename).resolve())
        if file in ours:
            files[file] = files.get(file, 0) + 1
            called.add((file, frame.f_code.co_qualname))
            changes, last = changes + (file != last), file

    with Engine.open(memory=embedded_assets() / "memory", learn=False) as engine:
        engine.score(photo, k=k)
        engine.forget_photos()
        threading.setprofile(note)
        sys.setprofile(note)
        try:
            engine.score(photo, k=k)
        finally:
            sys.setprofile(None)
            threading.setprofile(None)
    names = sorted(str(Path(file).relative_to(ROOT)) for file in files)
    return {"files": names, "functions": len(called), "changes of file": changes}


def made_photo() -> bytes:
    """Make a photo, where none is named."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    pixels = random.integers(0, 255, (24, 32, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((512, 384)).save(file, "JPEG")
    return file.getvalue()


def lines_of(path: Path) -> int:
    """Count the lines of a file."""
    return len(path.read_text().splitlines())


def counted(photo: Path | None) -> dict[str, Any]:
    """Give every count, JSON-ready."""
    files = modules().values()
    source = photo or made_photo()
    counts: dict[str, Any] = {
        "installed Python, lines": sum(map(lines_of, files)),
        "installed Python, files": len(files),
        "functions with more than 7 parameters": long_signatures(),
        "circles between files": circles(),
        "places that score a photo": scoring_places(),
        "README, lines": lines_of(ROOT / "README.md"),
        "ARCHITECTURE, lines": lines_of(ROOT / "ARCHITECTURE.md"),
        "a photo, K = 32": trace_of(source, 32),
        "a photo, K = 0": trace_of(source, 0),
    }
    return counts


def text_of(counts: dict[str, Any]) -> str:
    """Lay the counts out, a line each."""
    rows = []
    for name, value in counts.items():
        if isinstance(value, dict):
            count = len(value["files"])
            rest = ", ".join(f"{value[n]} {n}" for n in ("functions", "changes of file"))
            rows.append(f"{name:<42}{count:>7} files, {rest}: {', '.join(value['files'])}")
        elif isinstance(value, list):
            named = "; ".join(", ".join(v) if isinstance(v, list) else v for v in value)
            rows.append(f"{name:<42}{len(value):>7} {named}".rstrip())
        else:
            rows.append(f"{name:<42}{value:>7}")
    return "\n".join(rows)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.house", description=__doc__)
    parser.add_argument("--photo", type=Path, help="to be followed (default: a made one)")
    parser.add_argument("--format", choices=("text", "json"), default="text")
    options = parser.parse_args()
    counts = counted(options.photo)
    print(json.dumps(counts, indent=2) if options.format == "json" else text_of(counts))


if __name__ == "__main__":
    main()
