"""A package's graphs on the device that was asked for, and on no other."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from meiqa.engine.manifest import DEVICES, GRAPHS, PATTERNS
from meiqa.engine.package import EnginePackage
from meiqa.engine.runtime.decoder import (
    LAYERS_FILE,
    ROWS_PER_CALL,
    Decoder,
    GraphDecoder,
    GraphSession,
    NativeDecoder,
    comparisons,
    fastest,
    kernel_for,
    read_layers,
    thread_counts,
)
from meiqa.errors import UsageError
from meiqa.kernels.cores import cores_differ, usable_cores, usable_memory
from meiqa.kernels.decoder import FASTEST, KERNELS
from meiqa.locations import user_cache

LOG = logging.getLogger(__name__)
LARGEST_CACHED_BYTES = 32 << 20
"""Decoders up to here stay in a processor's cache, where the kernel beats any graph; how larger
ones are faster is measured."""
HELD_WHILE_MEASURED = 3
"""Times its weights that measuring a decoder holds, at most: packed twice, and as they lie."""


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
    threads = None if threads is None else usable_threads(threads)
    way = _way(package, threads) if device == "cpu" else Way(native=False, threads=threads)
    names = [name for name in GRAPHS if name != "decoder" or not way.native]
    names += [PATTERNS] if patterns and package.manifest.patterns else []
    with ThreadPoolExecutor(1) as beside:
        opening = beside.submit(open_graphs, package, names, device, way.threads)
        layers = read_layers(package) if way.native else None
        opened = dict(zip(names, opening.result(), strict=True))
    decoder: Decoder
    if layers is None:
        decoder = GraphDecoder(opened["decoder"], package.manifest.decoder)
    else:
        decoder = NativeDecoder(*layers, usable_threads(way.threads))
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


@dataclass(frozen=True)
class Way:
    """How a decoder runs on a CPU: by the kernel or by its graph, among so many threads.

    None stands for the runtime's own choice of threads, which is all cores.
    """

    native: bool
    threads: int | None

    def __str__(self) -> str:
        return f"{'kernel' if self.native else 'graph'} {self.threads or 'all'}"


def _way(package: EnginePackage, threads: int | None) -> Way:
    """Choose how a decoder runs; where that is in doubt, by what was measured, once.

    Whether the kernel runs it does not hang on the threads that are asked for.
    """
    graph, kernel = (Way(native=native, threads=None) for native in (False, True))
    stored = sum(
        (package.path / file).stat().st_size
        for file in package.manifest.every_graph["decoder"].files
    )
    large = stored > LARGEST_CACHED_BYTES
    # A kernel without products of bytes holds them as floats, four times as large.
    in_floats = not KERNELS[FASTEST].together
    if LAYERS_FILE not in package.manifest.files or (large and in_floats):
        found = graph
    elif large and stored * HELD_WHILE_MEASURED > usable_memory():
        LOG.info("there is no memory to measure the decoder: the kernel runs it")
        found = kernel
    elif threads is None and cores_differ():
        kernels = [Way(native=True, threads=count) for count in thread_counts(usable_cores())]
        found = _measured(package, [*kernels, *([graph] if large else [])])
    else:
        found = _measured(package, [kernel, graph]) if large else kernel
    return found if threads is None else Way(found.native, threads)


def _measured(package: EnginePackage, ways: Sequence[Way]) -> Way:
    """Give the way that comparisons are fastest; it is kept for later processes."""
    import onnxruntime

    from meiqa.engine.runtime.onnx import processor

    on = (onnxruntime.__version__, kernel_for(package), processor() or "", str(usable_cores()))
    of = hashlib.sha256("\0".join([package.digest, *on, *map(str, ways)]).encode()).hexdigest()
    kept = user_cache() / "costs" / f"{of[:32]}-decoder"
    try:
        return {str(way): way for way in ways}[kept.read_text()]
    except FileNotFoundError:
        pass
    except (OSError, KeyError, ValueError) as error:
        LOG.warning("%s cannot be read, and the decoder is measured again: %s", kept, error)
    rows = min(usable_cores(), ROWS_PER_CALL)
    decoders = zip(ways, _decoders(package, ways), strict=True)
    found = fastest({way: comparisons(decoder, package, rows) for way, decoder in decoders})
    _trim()
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        unfinished = kept.with_suffix(f".{os.getpid()}")
        unfinished.write_text(str(found))
        os.replace(unfinished, kept)
    except OSError as error:
        LOG.warning("%s is not kept, and the decoder is measured each time: %s", kept, error)
    return found


def _trim() -> None:
    """Return to the system what measured decoders held: glibc would keep it for later."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _decoders(package: EnginePackage, ways: Sequence[Way]) -> Iterator[Decoder]:
    """Open a decoder in several ways, which share its layers."""
    layers = read_layers(package)
    for way in ways:
        if way.native and layers is not None:
            yield NativeDecoder(*layers, usable_threads(way.threads))
        else:
            (session,) = open_graphs(package, ["decoder"], "cpu", way.threads)
            yield GraphDecoder(session, package.manifest.decoder)


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
