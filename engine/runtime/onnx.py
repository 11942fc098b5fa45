"""ONNX Runtime behind the seam: CPU and CUDA providers, and graphs kept as it optimised them.

Optimising is most of what opening a small package takes. The result, bound to the processor and to
the version of ONNX Runtime, lies in the user's cache with its digest at the end. Nothing hangs on
it: what is not there, or is not what was written, is made anew.
"""

from __future__ import annotations

import hashlib
import logging
import mmap
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import onnxruntime

from meiqa.engine.manifest import PATTERNS, Graph
from meiqa.engine.package import EnginePackage
from meiqa.engine.runtime.decoder import EXPORT_AGAIN, Array, Floats
from meiqa.errors import DeviceUnavailable, PackageCorrupted, install_hint, one_line
from meiqa.locations import user_cache

LOG = logging.getLogger(__name__)
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
UNWANTED_OPTIMIZERS = ["WeightBiasQuantization"]
"""Rounds the weights of a layer between two quantised ones to 8 bits, one scale for all, where the
export measured that the layer needs more: a depthwise convolution loses a third of its signal."""
_STATE = onnxruntime.capi.onnxruntime_pybind11_state
UNLOADABLE = (_STATE.Fail, _STATE.InvalidArgument, _STATE.InvalidProtobuf, _STATE.InvalidGraph)
"""What ONNX Runtime raises for a file that holds no graph of its own."""
SPIN_US = "100"
"""How long a thread without work looks for some before it sleeps: from one node to the next."""
LARGEST_BYTES = 64 << 20
"""Larger graphs take longer to write than they do to optimise."""
MOST_KEPT = 16
"""Graphs in the cache; beyond that those are removed that were not used for longest."""
_DIGEST_BYTES = hashlib.sha256().digest_size


class OnnxSession:
    """A graph in ONNX Runtime on the device that was asked for, never on another.

    `kept` is where it is kept for later processes as it was optimised, if it is.
    """

    def __init__(
        self,
        folder: Path,
        graph: Graph,
        device: str,
        threads: int | None,
        kept: KeptGraph | None = None,
    ) -> None:
        path, provider = folder / graph.file, PROVIDERS[device]
        try:
            session = kept and (_from_kept(kept, threads) or _kept_now(path, threads, kept))
            self._session = session or _made(path, _options(threads), provider)
        except UNLOADABLE as error:
            what, seen = f"ONNX Runtime can't load {path}", str(error).splitlines()[0]
            raise PackageCorrupted(what, seen=seen, hint=EXPORT_AGAIN) from error
        if provider not in self._session.get_providers():
            raise _missing(device)
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        self._outputs = [value.name for value in outputs]
        for kind, found, listed in (
            ("inputs", [value.name for value in inputs], graph.inputs),
            ("outputs", self._outputs, graph.outputs),
        ):
            if sorted(found) != sorted(listed):
                raise PackageCorrupted(
                    f"{path} has other {kind} than its manifest says",
                    seen=", ".join(found),
                    allowed=", ".join(listed),
                    hint=EXPORT_AGAIN,
                )

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Floats]:
        """Execute the graph; see `GraphSession`."""
        return dict(zip(self._outputs, self._session.run(None, dict(inputs)), strict=True))


def open_onnx(
    package: EnginePackage, names: Sequence[str], device: str, threads: int | None
) -> list[OnnxSession]:
    """Load some of a package's graphs, side by side; see `open_runtime`."""
    if PROVIDERS[device] not in onnxruntime.get_available_providers():
        raise _missing(device)

    def opened(name: str) -> OnnxSession:
        kept = kept_graph(package, name) if device == "cpu" else None
        return OnnxSession(package.path, package.manifest.every_graph[name], device, threads, kept)

    # The first time each is optimised by one thread, which takes longer than the rest of opening.
    with ThreadPoolExecutor(2) as beside:
        return list(beside.map(opened, names))


def _made(
    path: Path, options: onnxruntime.SessionOptions, provider: str
) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(
        path, options, providers=[provider], disabled_optimizers=UNWANTED_OPTIMIZERS
    )


def _options(threads: int | None, **entries: str) -> onnxruntime.SessionOptions:
    """Make the options of every session, and add entries of one's own.

    Threads of a session spin for a while when they are made and after each answer, in the way of
    the other session's and of the kernels' threads: that took a third of a photo's time. Patterns
    of memory would hold a block for each shape of input, 50 MB in all, and save no time.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.enable_mem_pattern = False
    entries |= {"force_spinning_stop": "1", "intra_op.spin_duration_us": SPIN_US}
    for name, value in entries.items():
        options.add_session_config_entry(f"session.{name}", value)
    if threads is not None:
        options.intra_op_num_threads = threads
    return options


def _from_kept(kept: KeptGraph, threads: int | None) -> onnxruntime.InferenceSession | None:
    if not kept.is_sound():
        return None
    mapped = {"use_memory_mapped_ort_model": "1", "use_ort_model_bytes_for_initializers": "1"}
    options = _options(threads, load_model_format="ORT", **mapped)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return onnxruntime.InferenceSession(kept.path, options, providers=[PROVIDERS["cpu"]])
    except Exception as error:  # whatever it is, the graph itself can still be opened
        LOG.warning("%s is optimised anew: %s", kept.path, one_line(str(error)))
        return None


def _kept_now(
    path: Path, threads: int | None, kept: KeptGraph
) -> onnxruntime.InferenceSession | None:
    options = _options(threads, save_model_format="ORT")
    try:
        with kept.written() as unfinished:
            options.optimized_model_filepath = str(unfinished)
            return _made(path, options, PROVIDERS["cpu"])
    except Exception as error:  # a fault of the graph's own shows again without writing
        LOG.debug("%s is not kept: %s", path, error)
        return None


@dataclass(frozen=True)
class KeptGraph:
    """A place for one graph as it was optimised; `identity` is all that the result depends on."""

    identity: tuple[str, ...]

    @property
    def path(self) -> Path:
        """The file, which need not exist."""
        name = hashlib.sha256("\0".join(self.identity).encode()).hexdigest()
        return kept_graphs() / f"{name[:32]}.graph"

    def is_sound(self) -> bool:
        """Say whether the graph is there, as it was written."""
        try:
            with (
                self.path.open("rb") as file,
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as kept,
            ):
                found = hashlib.sha256(memoryview(kept)[:-_DIGEST_BYTES]).digest()
                sound = found == kept[-_DIGEST_BYTES:]
            os.utime(self.path)  # the oldest are those that were not used
        except ValueError:  # an empty file can't be mapped
            sound = False
        except (OSError, RuntimeError):  # also where a cache or a home cannot be
            return False
        if not sound:
            LOG.warning("%s is damaged; the graph is optimised anew", self.path)
        return sound

    @contextmanager
    def written(self) -> Iterator[Path]:
        """Give a file of one's own to write to, which then gets its digest and its name."""
        kept_graphs().mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix="unfinished-", dir=kept_graphs())
        os.close(descriptor)
        try:
            yield Path(name)
            with open(name, "rb+") as file:
                file.write(hashlib.sha256(file.read()).digest())
            os.replace(name, self.path)
        finally:
            Path(name).unlink(missing_ok=True)
        with suppress(OSError):  # another process may be at it
            files = kept_graphs().iterdir()  # those of interrupted writers included
            newest = sorted(files, key=lambda each: each.stat().st_mtime, reverse=True)
            for old in newest[MOST_KEPT:]:
                old.unlink(missing_ok=True)


def kept_graphs() -> Path:
    return user_cache() / "graphs"


def kept_graph(package: EnginePackage, name: str) -> KeptGraph | None:
    """Give the place of a package's graph as optimised for this CPU; None if it is too large."""
    manifest = package.manifest
    stored = [(package.path / file).stat() for file in manifest.every_graph[name].files]
    if sum(each.st_size for each in stored) > LARGEST_BYTES or (cpu := processor()) is None:
        return None
    # Files that are not what the digest says, in a package that was not verified, are others.
    files = [f"{each.st_size} {each.st_mtime_ns}" for each in stored]
    made_by, version = manifest.digest, onnxruntime.__version__
    if manifest.patterns and name == PATTERNS:  # they are not part of the package's digest
        made_by = manifest.patterns.sha256
    return KeptGraph(("2", made_by, name, *files, version, *UNWANTED_OPTIMIZERS, cpu))


def processor() -> str | None:
    """Tell what a processor can do, in words that differ where its graphs may, if they're known."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            # Of the first of its cores; the others are only written down when they are read.
            first = file.read(8192).split("\n\n")[0]
    except OSError:
        return None
    telling = ("model name", "flags", "CPU implementer", "CPU part", "Features")
    return "\n".join(line for line in first.splitlines() if line.startswith(telling))


def _missing(device: str) -> DeviceUnavailable:
    return DeviceUnavailable(
        f"device {device!r} can't be used here",
        seen=", ".join(onnxruntime.get_available_providers()),
        hint=f"use --device cpu, or {install_hint('gpu')} in an environment without meiqa[cpu]",
    )
