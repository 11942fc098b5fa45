"""The house stands as it was drawn: rooms, packaging, and what the online rooms may import."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = PROJECT["tool"]["scikit-build"]["wheel"]["packages"]
LABORATORY = {"benchmarks", "training"}
ONLINE = ["engine", "evaluation", "kernels", "memory", "meiqa", "serve"]
OFFLINE_ONLY = {"torch", "transformers", "meiqa.export", *LABORATORY}
IMPORT_NAMES = {"pillow": "PIL", "scikit-image": "skimage"}


def folder_of(room: str) -> Path:
    return ROOT / "src" / "meiqa" if room == "meiqa" else ROOT / room


def import_name(room: str, file: Path) -> str:
    inside = file.relative_to(folder_of(room)).with_suffix("").parts
    parts = ("meiqa",) if room == "meiqa" else ("meiqa", room)
    return ".".join([*parts, *(part for part in inside if part != "__init__")])


def online_modules() -> dict[str, Path]:
    """Every module of the online rooms, except ``__main__``, which runs when imported."""
    return {
        import_name(room, file): file
        for room in ONLINE
        for file in sorted(folder_of(room).rglob("*.py"))
        if file.name != "__main__.py"
    }


def imported_packages(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names - set(sys.stdlib_module_names) - {"meiqa"}


def declared(*extras: str) -> set[str]:
    optional = PROJECT["project"]["optional-dependencies"]
    wanted = [
        *PROJECT["project"]["dependencies"],
        *(r for extra in extras for r in optional[extra]),
    ]
    names = (re.split(r"[^\w.-]", requirement)[0] for requirement in wanted)
    found = {IMPORT_NAMES.get(name, name.replace("-", "_")) for name in names}
    # numba pins the release of llvmlite that it works with, and is extended through it.
    return found | {"llvmlite"} if "numba" in found else found


EXTRAS_OF = {
    **dict.fromkeys(("meiqa.batches", "meiqa.parts", "meiqa.sources"), ("cpu", "parquet")),
    "meiqa.ray": ("cpu", "parquet", "serve", "ray"),
    "meiqa.client": ("serve",),
    "meiqa.engine.completions": ("cpu", "serve"),
    "meiqa.evaluation.calibration": ("cpu", "eval"),
    "meiqa.evaluation.fitting": ("eval",),
    "meiqa.evaluation.metrics": ("eval",),
    "meiqa.evaluation.plots": ("cpu", "plots"),
    "meiqa.evaluation.scenes": ("cpu", "eval"),
    "meiqa.evaluation.speed": ("cpu", "bench"),
    "meiqa.kernels.hnsw": ("index",),
    "meiqa.memory.hub": ("hub",),
    "meiqa.memory.index": ("index",),
    "meiqa.memory.maintenance": ("parquet",),
    "meiqa.memory.replica": ("hub",),
}
"""Modules that need more, of which a command says so where it is not installed."""


def test_every_room_is_packaged() -> None:
    rooms = {init.parent.name for init in ROOT.glob("*/__init__.py")} - {"tests", *LABORATORY}
    assert set(PACKAGES.values()) == rooms | {"src/meiqa"}
    assert all(target.split("/")[-1] == Path(folder).name for target, folder in PACKAGES.items())


def test_the_makefile_knows_every_room() -> None:
    listed = re.search(r"^ROOMS\s*:=(.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert listed is not None
    assert {*listed[1].split(), "src/meiqa"} == set(PACKAGES.values())


def test_the_online_rooms_load_without_the_offline_ones() -> None:
    probe = (
        "import importlib, sys\n"
        "for name in sys.argv[1].split(): importlib.import_module(name)\n"
        f"print(*sorted(sys.modules.keys() & {OFFLINE_ONLY!r}))"
    )
    run = subprocess.run(
        [sys.executable, "-c", probe, " ".join(online_modules())],
        cwd=ROOT / "tests",
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == ""


@pytest.mark.parametrize("name", sorted(online_modules()))
def test_the_online_rooms_import_only_what_they_declare(name: str) -> None:
    room = ("cpu", "serve", "camera") if name.startswith("meiqa.serve") else ("cpu", "demo")
    extras = EXTRAS_OF.get(name, room)
    assert imported_packages(online_modules()[name]) <= declared(*extras)


def test_no_extra_installs_both_onnx_runtimes() -> None:
    for requirements in PROJECT["project"]["optional-dependencies"].values():
        named = {re.split(r"[^\w-]", requirement)[0] for requirement in requirements}
        assert not {"onnxruntime", "onnxruntime-gpu"} <= named
