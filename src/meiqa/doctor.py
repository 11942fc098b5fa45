"""What `meiqa doctor` looks at: everything a score depends on, and how to mend what is missing."""

from __future__ import annotations

import importlib
import os
import platform
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import meiqa
from meiqa.errors import MeiqaError
from meiqa.locations import package_memory, user_memory

if TYPE_CHECKING:
    from meiqa.engine.pipeline import Engine

__all__ = ["examine", "report_text"]

_REQUIRED = ("numpy", "scipy", "numba", "pillow", "tokenizers")
_RUNTIMES = ("onnxruntime", "onnxruntime-gpu")
_INSTALL = "pip install 'meiqa[cpu]'"


def examine(
    open_engine: Callable[[], Engine], memory: str | None, *, verify: bool = True
) -> dict[str, Any]:
    """Look at everything a score depends on.

    Args:
        open_engine: Opens the engine as the user would.
        memory: Directory of the memory, None for the user's own.
        verify: Whether `open_engine` checks the package's digests.

    Returns:
        JSON-ready: versions, machine, providers, native_kernel, package, caches, memory, and
        missing: a list of {what, hint}, empty if photos can be scored. The user's own memory may be
        unwritable, one that was asked for may not.
    """
    missing: list[dict[str, str | None]] = []
    report: dict[str, Any] = {
        "versions": _versions(missing),
        "machine": _machine(),
        "providers": _providers(),
        "native_kernel": _native_kernel(missing),
        "package": None,
        "caches": {},
        "memory": _memory_directory(user_memory() if memory is None else Path(memory)),
    }
    if memory is not None and not report["memory"]["writable"]:
        hint = "name another directory with --memory DIR, or only read it with --no-learn"
        missing.append({"what": f"{memory} cannot be written", "hint": hint})
    try:
        with open_engine() as engine:
            report["package"] = {
                "path": str(engine.package.path),
                "digest": engine.package.digest,
                "verified": verify,
            }
            if memory is None:
                report["memory"] = _memory_directory(package_memory(engine.package.digest))
            report["caches"] = {name: asdict(state) for name, state in engine.caches().items()}
            snapshot = engine.memory.snapshot()
            report["memory"]["anchors"] = snapshot.count_anchors
            report["memory"]["contrast"] = snapshot.count_contrast
    except MeiqaError as error:
        missing.append({"what": str(error), "hint": error.hint})
    except ImportError as error:
        if not missing:  # otherwise this follows from what is listed already
            missing.append({"what": str(error), "hint": _INSTALL})
    report["missing"] = missing
    return report


def report_text(report: Mapping[str, Any]) -> str:
    """Lay out the report of `examine` for people."""
    machine, package, memory = report["machine"], report["package"], report["memory"]
    lines = [
        f"{name:<16}{number or 'not installed'}" for name, number in report["versions"].items()
    ]
    lines += [
        f"{'system':<16}{machine['system']}, {machine['cpus']} CPUs",
        f"{'CPU features':<16}{' '.join(machine['cpu_features']) or 'unknown'}",
        f"{'providers':<16}{', '.join(report['providers']) or 'none'}",
        f"{'native kernel':<16}{'loaded' if report['native_kernel'] else 'not loaded'}",
    ]
    if package:
        checked = "digests verified" if package["verified"] else "digests not verified"
        lines.append(f"{'package':<16}{package['path']} ({checked})")
        lines.append(f"{'package digest':<16}{package['digest']}")
    else:
        lines.append(f"{'package':<16}not opened")
    for name, state in report["caches"].items():
        held, limit = state["used_bytes"] / 2**20, state["limit_bytes"] / 2**20
        lookups = f"{state['hits']} hits, {state['misses']} misses"
        lines.append(f"{'cache':<16}{name}: {held:.0f} of {limit:.0f} MiB, {lookups}")
    access = "writable" if memory["writable"] else "not writable: nothing is remembered"
    lines.append(f"{'memory':<16}{memory['path']} ({access})")
    if memory["anchors"] is not None:
        lines.append(f"{'':<16}{memory['anchors']} anchors, {memory['contrast']} contrast cases")
    lines += ["", *_verdict(report["missing"])]
    return "\n".join(lines)


def _verdict(missing: list[dict[str, str | None]]) -> list[str]:
    if not missing:
        return ["Everything is there."]
    lines = ["Missing:"]
    for entry in missing:
        lines.append(f"  {entry['what']}")
        if entry["hint"] and entry["hint"] not in (entry["what"] or ""):
            lines.append(f"    {entry['hint']}")
    return lines


def _versions(missing: list[dict[str, str | None]]) -> dict[str, str | None]:
    versions: dict[str, str | None] = {
        "python": platform.python_version(),
        "meiqa": meiqa.__version__,
    }
    for name in (*_REQUIRED, *_RUNTIMES):
        versions[name] = None
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    for name in _REQUIRED:
        if versions[name] is None:
            missing.append({"what": f"{name} is not installed", "hint": f"pip install {name}"})
    if not any(versions[name] for name in _RUNTIMES):
        missing.append({"what": "ONNX Runtime is not installed", "hint": _INSTALL})
    return versions


def _machine() -> dict[str, Any]:
    return {
        "system": platform.platform(),
        "cpus": os.cpu_count(),
        "cpu_features": _cpu_features(),
    }


def _cpu_features() -> list[str]:
    """List the vector extensions that NumPy has found on this machine."""
    try:
        import numpy as np
    except ImportError:
        return []
    configuration: Any = np.show_config(mode="dicts")
    extensions = configuration["SIMD Extensions"]
    return [*extensions.get("baseline", ()), *extensions.get("found", ())]


def _providers() -> list[str]:
    try:
        onnxruntime = importlib.import_module("onnxruntime")
    except ImportError:
        return []
    return list(onnxruntime.get_available_providers())


def _native_kernel(missing: list[dict[str, str | None]]) -> bool:
    try:
        importlib.import_module("meiqa.kernels._native")
    except ImportError as error:
        what = f"the native kernel cannot be loaded: {error}"
        missing.append({"what": what, "hint": _INSTALL})
        return False
    return True


def _memory_directory(path: Path) -> dict[str, Any]:
    existing = path
    while not os.path.exists(existing) and existing != existing.parent:
        existing = existing.parent
    writable = existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
    return {"path": str(path), "writable": writable, "anchors": None, "contrast": None}
