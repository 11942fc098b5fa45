"""A package's graphs on the device that was asked for, and on no other."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from meiqa.engine.manifest import DEVICES, GRAPHS, PATTERNS
from meiqa.engine.package import EnginePackage
from meiqa.engine.runtime.decoder import (
    Decoder,
    GraphDecoder,
    GraphSession,
    NativeDecoder,
    fastest_threads,
    read_layers,
)
from meiqa.errors import UsageError
from meiqa.kernels.cores import cores_differ, usable_cores
from meiqa.kernels.decoder import FASTEST
from meiqa.locations import user_cache

LOG = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Runtime:
    """A package's graphs, ready to run; patterns only if they were asked for and are there."""

    vision: GraphSession
    decoder: Decoder
    patterns: GraphSession | None


def open_runtime(
    package: EnginePackage,
    device: str = "cpu",
    threads: int | None = None,
    *,
    patterns: bool = False,
) -> Runtime:
    """Open a package's graphs; only the runtime that is asked for is imported.

    Args:
        device: "cpu", "cuda", or "tensorrt" for engines that `meiqa build` made.
        threads: of the runtime; by default its own choice and all cores, or on a CPU whose cores
            differ as many as a measurement finds fastest, which is kept for later processes.
        patterns: open the graph of the distortion patterns as well, if there is one.

    Raises:
        DeviceUnavailable: there is no such device, or no runtime or engine for it.
        PackageCorrupted: a graph can't be loaded, or is not the one that the manifest describes.
    """
    if threads is None and device == "cpu" and cores_differ():
        threads = _measured_threads(package)
    cores = usable_threads(threads)
    names = [*GRAPHS, PATTERNS] if patterns and package.manifest.patterns else [*GRAPHS]
    with ThreadPoolExecutor(1) as beside:
        opening = beside.submit(open_graphs, package, names, device, threads and cores)
        layers = read_layers(package) if device == "cpu" else None
        opened = dict(zip(names, opening.result(), strict=True))
    decoder: Decoder = GraphDecoder(opened["decoder"], package.manifest.decoder)
    if layers is not None:
        decoder = NativeDecoder(decoder, *layers, cores)
    return Runtime(opened["vision"], decoder, opened.get(PATTERNS))


def open_graphs(
    package: EnginePackage, names: Sequence[str], device: str, threads: int | None
) -> Sequence[GraphSession]:
    """Open some of a package's graphs; see `open_runtime`."""
    usable = None if threads is None else usable_threads(threads)
    if device not in DEVICES:
        raise UsageError("unknown device", seen=device, allowed=", ".join(DEVICES))
    if device == "tensorrt":
        from meiqa.engine.runtime.tensorrt import open_tensorrt

        return open_tensorrt(package, names)
    from meiqa.engine.runtime.onnx import open_onnx

    return open_onnx(package, names, device, usable)


def _measured_threads(package: EnginePackage) -> int | None:
    """Give the threads that are fastest here; None where the decoder is not in the kernels."""
    kept = user_cache() / "costs" / f"{package.digest[:16]}-{FASTEST}-threads-{usable_cores()}"
    try:
        return usable_threads(int(kept.read_text()))
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        LOG.warning("%s cannot be read, and threads are measured again: %s", kept, error)
    read = read_layers(package)
    if read is None:
        return None
    threads = fastest_threads(read[0], usable_cores())
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(str(threads))
    except OSError as error:
        LOG.warning("%s is not kept, and threads are measured each time: %s", kept, error)
    return threads


def usable_threads(threads: int | None) -> int:
    """Give the threads that work is shared among: at most as many as there are cores."""
    cores = usable_cores()
    if threads is None:
        return cores
    if threads < 1:
        raise UsageError("threads must be positive", seen=threads, allowed="1 or more")
    if threads > cores:
        LOG.warning("%d threads are asked for, and %d are used: one a core", threads, cores)
    return min(threads, cores)
