"""`meiqa doctor`: everything a score depends on, and how to mend what is missing."""

from __future__ import annotations

import importlib
import os
import platform
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import meiqa
from meiqa.cli import options as cli
from meiqa.cli.options import Options
from meiqa.errors import TENSORRT_EXTRA, MeiqaError, install_hint
from meiqa.formats import tree_text
from meiqa.locations import package_memory, user_memory

REQUIRED = ("numpy", "pillow", "tokenizers", "nanobind-backend", "click", "platformdirs")
RUNTIMES = ("onnxruntime", "onnxruntime-gpu")
OPTIONAL = ("numba", "hnswlib", "scipy")
EXTRAS = (
    *("photos", "serve", "camera", "index", "eval", "parquet", "ray", "hub", "export"),
    TENSORRT_EXTRA,
)
MAPPINGS, STATUS = Path("/proc/self/smaps"), Path("/proc/self/status")
_FILES_SHOWN = 4
_PEAK = re.compile(r"^VmHWM:\s*(\d+) kB", re.MULTILINE)
_ALL_THERE = "Everything that scoring needs is there."
_REQUIRED_BY = re.compile(r"(?P<name>[\w.-]+).*extra == ['\"](?P<extra>\w+)")


@cli.command()
@cli.format_option("text", "json")
@cli.engine_options()
def doctor_command(options: Options) -> int:
    """Say what is installed and what is missing."""
    report = examine(options)
    cli.print_report(report, options.format, report_text)
    return cli.EXIT_FAILURES if report["missing"] else 0


def examine(options: Options) -> dict[str, Any]:
    """Look at everything a score depends on, with the engine that these options open.

    Returns:
        JSON-ready: versions, extras (with what each lacks), machine, providers, native_kernel,
        package, caches, memory, process (see `held`, with the engine open), and missing: a list of
        {what, hint}, empty if photos can be scored.
        The user's own memory may be unwritable, one that was asked for may not.
    """
    memory = options.memory
    missing: list[dict[str, str | None]] = []

    def miss(what: str, hint: str | None) -> None:
        missing.append({"what": what, "hint": hint})

    versions = {name: _version(name) for name in (*REQUIRED, *RUNTIMES, *OPTIONAL)}
    for name in REQUIRED:
        if versions[name] is None:
            miss(f"{name} is not installed", f"pip install {name}")
    if not any(versions[name] for name in RUNTIMES):
        miss("ONNX Runtime is not installed", install_hint("cpu"))
    numpy, runtime = _loaded("numpy"), _loaded("onnxruntime")
    found = numpy.show_config(mode="dicts")["SIMD Extensions"] if numpy else {}
    report: dict[str, Any] = {
        "versions": {
            "python": platform.python_version(),
            "meiqa": meiqa.__version__,
            **versions,
        },
        "extras": {extra: _lacking(extra) for extra in EXTRAS},
        "machine": {
            "system": platform.platform(),
            "cpus": os.cpu_count(),
            "cpu_features": [*found.get("baseline", ()), *found.get("found", ())],
        },
        "providers": list(runtime.get_available_providers()) if runtime else [],
        "native_kernel": True,
        "package": None,
        "caches": {},
        "memory": _memory_directory(user_memory() if memory is None else Path(memory)),
        "process": None,
    }
    try:
        importlib.import_module("meiqa.kernels._native")
    except ImportError as error:
        report["native_kernel"] = False
        miss(f"the native kernel cannot be loaded: {error}", install_hint("cpu"))
    if memory is not None and not report["memory"]["writable"]:
        hint = "name another directory with --memory DIR, or only read it with --no-learn"
        miss(f"{memory} cannot be written", hint)
    try:
        with cli.engine_of(options) as engine:
            path, digest = str(engine.package.path), engine.package.digest
            report["package"] = {"path": path, "digest": digest, "verified": not options.no_verify}
            if memory is None:
                report["memory"] = _memory_directory(package_memory(digest))
            report["caches"] = {name: asdict(state) for name, state in engine.caches().items()}
            snapshot = engine.memory.snapshot()
            report["memory"]["anchors"] = snapshot.count_anchors
            report["memory"]["contrast"] = snapshot.count_contrast
            report["process"] = held()
    except MeiqaError as error:
        miss(str(error), error.hint)
    except ImportError as error:
        if not missing:  # otherwise this follows from what is listed already
            miss(str(error), install_hint("cpu"))
    report["missing"] = missing
    return report


def held() -> dict[str, Any] | None:
    """Say what of this process lies in memory; None where the system does not tell.

    Returns:
        resident_bytes, mapped_bytes of it (of mapped files: pages that other processes share, and
        copies of those changed here), peak_bytes, and files: resident bytes of each mapped file,
        the most first.
    """
    try:
        mappings, status = MAPPINGS.read_text(), STATUS.read_text()
    except OSError:
        return None
    files, resident, name = Counter[str](), 0, ""
    for line in mappings.splitlines():
        field, _, rest = line.partition(" ")
        if not field.endswith(":"):  # a mapping: addresses, rights, offset, device, inode, path
            name = "".join(line.split(maxsplit=5)[5:])
        elif field == "Rss:":
            resident += (here := int(rest.split()[0]) * 1024)
            if name.startswith("/"):
                files[name] += here
    peak = _PEAK.search(status)
    if not (resident and peak):  # as in some sandboxes
        return None
    return {
        "resident_bytes": resident,
        "mapped_bytes": files.total(),
        "peak_bytes": int(peak[1]) * 1024,
        "files": {path: count for path, count in files.most_common() if count},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _lacking(extra: str) -> list[str]:
    """The distributions that an extra brings and that are not installed."""
    try:
        wanted = [_REQUIRED_BY.match(each) for each in requires("meiqa") or ()]
    except PackageNotFoundError:  # a source tree on the path knows of no extras
        return ["meiqa"]
    names = [each["name"] for each in wanted if each and each["extra"] == extra]
    return [name for name in names if _version(name) is None]


def _loaded(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def _memory_directory(path: Path) -> dict[str, Any]:
    existing = path
    while not os.path.exists(existing) and existing != existing.parent:
        existing = existing.parent
    writable = existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
    return {"path": str(path), "writable": writable, "anchors": None, "contrast": None}


def _extra_text(name: str, lacks: list[str]) -> str:
    return f"lacks {', '.join(lacks)}: {install_hint(name)}" if lacks else "installed"


def _held_text(process: Mapping[str, Any]) -> str:
    def mib(count: int) -> str:
        return f"{count / 2**20:.0f}"

    most = list(process["files"].items())[:_FILES_SHOWN]
    named = ", ".join(f"{Path(path).name} {mib(count)}" for path, count in most)
    return (
        f"{mib(process['resident_bytes'])} MiB resident (at most {mib(process['peak_bytes'])}), "
        f"{mib(process['mapped_bytes'])} of it mapped files: {named} …"
    )


def report_text(report: Mapping[str, Any]) -> str:
    """Lay out the report of `examine` for people."""
    package, memory = report["package"], report["memory"]
    access = "writable" if memory["writable"] else "not writable: nothing is remembered"
    shown = {
        **{name: number or "not installed" for name, number in report["versions"].items()},
        **{f"extra {name}": _extra_text(name, lacks) for name, lacks in report["extras"].items()},
        **report["machine"],
        "providers": report["providers"],
        "native kernel": "loaded" if report["native_kernel"] else "not loaded",
        "package": "not opened",
    }
    if package:
        checked = "digests verified" if package["verified"] else "digests not verified"
        shown["package"] = f"{package['path']} ({checked})"
        shown["package digest"] = package["digest"]
    for name, state in report["caches"].items():
        held, limit = state["used_bytes"] / 2**20, state["limit_bytes"] / 2**20
        lookups = f"{state['hits']} hits, {state['misses']} misses"
        shown[f"cache {name}"] = f"{held:.0f} of {limit:.0f} MiB, {lookups}"
    shown["memory"] = f"{memory['path']} ({access})"
    if memory["anchors"] is not None:
        shown["holds"] = f"{memory['anchors']} anchors, {memory['contrast']} contrast cases"
    if process := report["process"]:
        shown["process"] = _held_text(process)
    lines = [tree_text(shown), "", "Missing:" if report["missing"] else _ALL_THERE]
    for entry in report["missing"]:
        lines.append(f"  {entry['what']}")
        if entry["hint"] and entry["hint"] not in entry["what"]:
            lines.append(f"    {entry['hint']}")
    return "\n".join(lines)
