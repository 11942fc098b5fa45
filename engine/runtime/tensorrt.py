"""TensorRT behind the seam: engines that `meiqa build` made beforehand, never built at run time.

An engine belongs to one version of `tensorrt` or `tensorrt_rtx` and to one compute capability, and
accepts the shapes of its optimisation profiles only: all else is refused before the device is
touched.

Profiles begin at length 1, since kernels for empty tensors are the least travelled road. An empty
prefix or past is therefore fed as one entry of zeros, which the graph masks by its length of 0.
"""

from __future__ import annotations

import importlib
import logging
import mmap
import threading
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meiqa.engine.manifest import Profile, TensorRtEngine
from meiqa.engine.package import EnginePackage
from meiqa.engine.runtime.decoder import Array
from meiqa.errors import (
    TENSORRT_EXTRA,
    DeviceUnavailable,
    PackageCorrupted,
    UsageError,
    install_hint,
)

JETPACK = "apt install python3-libnvinfer, in an environment that sees the system's packages"
RUNTIMES = ("tensorrt_rtx", "tensorrt")
"""Import names, in the order of preference: the first is on PyPI and builds without a GPU."""
MASKED_WHEN_EMPTY = frozenset({"prefix", "past"})
"""Inputs whose real length the graph is told, so that an entry too many does no harm."""

_log = logging.getLogger(__name__)
_Shape = tuple[int, ...]


@dataclass(frozen=True)
class TensorRt:
    """An installed TensorRT: its module, and its only logger, which keeps the last errors."""

    name: str
    version: str
    api: Any
    logger: Any

    def forget_errors(self) -> None:
        """Begin something whose own errors are wanted."""
        self.logger.errors.clear()

    @property
    def errors(self) -> str:
        """What was reported since `forget_errors`."""
        return " / ".join(self.logger.errors) or "no reason was given"


def installed_tensorrts() -> list[TensorRt]:
    """Import every TensorRT that is installed, in the order of preference."""
    found, reasons = [], []
    for name in RUNTIMES:
        try:
            found.append(_imported(name))
        except (ImportError, OSError) as error:
            reasons.append(str(error))
    if not found:
        raise DeviceUnavailable(
            "TensorRT can't be used here",
            seen="; ".join(reasons),
            allowed=" or ".join(RUNTIMES),
            hint=install_hint("rtx") if TENSORRT_EXTRA == "rtx" else JETPACK,
        )
    return found


@cache
def _imported(name: str) -> TensorRt:
    api = importlib.import_module(name)
    levels = {
        api.ILogger.Severity.INTERNAL_ERROR: logging.ERROR,
        api.ILogger.Severity.ERROR: logging.ERROR,
        api.ILogger.Severity.WARNING: logging.INFO,  # of interest to whoever builds, not runs
        api.ILogger.Severity.INFO: logging.DEBUG,
        api.ILogger.Severity.VERBOSE: logging.DEBUG,
    }

    class Logger(api.ILogger):  # type: ignore[misc, name-defined]
        """Hands messages to Python's logging; what it keeps explains a failed call."""

        def __init__(self) -> None:
            api.ILogger.__init__(self)
            self.errors: deque[str] = deque(maxlen=4)

        def log(self, severity: Any, message: str) -> None:
            if levels[severity] == logging.ERROR:
                self.errors.append(message.strip())
                _log.info("%s: %s", name, message)
            else:
                _log.log(levels[severity], "%s: %s", name, message)

    return TensorRt(name, api.__version__, api, Logger())


class Gpu:
    """The first CUDA device, with one stream; what was allocated is freed with this object."""

    def __init__(self, cudart: Any) -> None:
        self._cudart = cudart
        self._allocated: list[int] = []
        if self._call(cudart.cudaGetDeviceCount()) == 0:
            raise DeviceUnavailable("there is no CUDA device")
        attributes = cudart.cudaDeviceAttr
        major, minor = (
            self._call(cudart.cudaDeviceGetAttribute(attribute, 0))
            for attribute in (
                attributes.cudaDevAttrComputeCapabilityMajor,
                attributes.cudaDevAttrComputeCapabilityMinor,
            )
        )
        self.capability = f"{major}.{minor}"
        self.stream = int(self._call(cudart.cudaStreamCreate()))
        # At the end of the process the driver frees everything itself.
        weakref.finalize(self, _free, cudart, self._allocated).atexit = False

    def allocate(self, nbytes: int) -> int:
        """Reserve device memory and give its address."""
        address = int(self._call(self._cudart.cudaMalloc(nbytes)))
        self._allocated.append(address)
        return address

    def upload(self, address: int, array: Array) -> None:
        """Copy a contiguous array to the device."""
        kind, at = self._cudart.cudaMemcpyKind.cudaMemcpyHostToDevice, array.ctypes.data
        self._call(self._cudart.cudaMemcpyAsync(address, at, array.nbytes, kind, self.stream))

    def download(self, array: NDArray[np.float32], address: int) -> None:
        """Copy from the device into a contiguous array, which is filled after `synchronise`."""
        kind, at = self._cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost, array.ctypes.data
        self._call(self._cudart.cudaMemcpyAsync(at, address, array.nbytes, kind, self.stream))

    def synchronise(self) -> None:
        """Wait until everything asked of the device is done."""
        self._call(self._cudart.cudaStreamSynchronize(self.stream))

    def _call(self, returned: tuple[Any, ...]) -> Any:
        """The value of a CUDA call, which comes behind its status."""
        status, *values = returned
        if int(status) != 0:
            text = self._cudart.cudaGetErrorString(status)[1]
            raise DeviceUnavailable(
                "the CUDA device can't be used",
                seen=text.decode(),
                hint="run with --device cpu, or build with --compute-capability for another GPU",
            )
        return values[0] if values else None


def _free(cudart: Any, addresses: Sequence[int]) -> None:
    for address in addresses:
        cudart.cudaFree(address)


def open_gpu() -> Gpu:
    """Open the first CUDA device."""
    try:
        cudart = importlib.import_module("cuda.bindings.runtime")
    except ImportError as error:
        what, hint = "CUDA's Python package is not installed", install_hint(TENSORRT_EXTRA)
        raise DeviceUnavailable(what, seen=error, hint=hint) from error
    return Gpu(cudart)


def hull(profiles: Sequence[Profile]) -> Profile:
    """Give the least profile that holds all; what is usual in it is usual in the first."""

    def extreme(choose: Any, name: str, end: int) -> _Shape:
        columns = zip(*(profile[name][end] for profile in profiles), strict=True)
        return tuple(choose(column) for column in columns)

    return {
        name: (extreme(min, name, 0), shapes[1], extreme(max, name, 2))
        for name, shapes in profiles[0].items()
    }


def fitting_profile(graph: str, shapes: Mapping[str, _Shape], profiles: Sequence[Profile]) -> int:
    """Give the index of the first profile that accepts the shapes of all inputs."""
    if shapes.keys() != profiles[0].keys():
        raise UsageError(
            f"the {graph} engine has other inputs",
            seen=", ".join(shapes),
            allowed=", ".join(profiles[0]),
        )
    refused = [
        [name for name, shape in shapes.items() if not _accepts(profile[name], shape)]
        for profile in profiles
    ]
    if [] in refused:
        return refused.index([])
    # Without one input that no profile takes it is the combination, and each profile names one.
    everywhere = [name for name in shapes if all(name in names for names in refused)]
    named = everywhere[:1] or list(dict.fromkeys(names[0] for names in refused))
    accepted = [
        ", ".join(f"{name} {profile[name][0]} to {profile[name][2]}" for name in named)
        for profile in profiles
    ]
    raise UsageError(
        f"the {graph} engine takes no such {', '.join(named)}",
        seen=", ".join(f"{name} {shape}" for name, shape in shapes.items()),
        allowed=" or ".join(dict.fromkeys(accepted)),
        hint="build the engines again with wider limits: see `meiqa build --help`",
    )


def _accepts(shapes: tuple[_Shape, _Shape, _Shape], shape: _Shape) -> bool:
    least, _, greatest = shapes
    return len(shape) == len(least) and all(
        low <= extent <= high for low, extent, high in zip(least, shape, greatest, strict=True)
    )


def without_empty_axes(inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Replace an empty prefix or past by one entry of zeros, which the graph masks."""
    return {
        name: np.zeros([extent or 1 for extent in array.shape], array.dtype)
        if name in MASKED_WHEN_EMPTY and array.size == 0
        else array
        for name, array in inputs.items()
    }


class TensorRtSession:
    """A graph compiled for this device; see `GraphSession`.

    All its memory on the device is allocated here, for the largest shapes of its profiles. An input
    that is read-only is taken at its word: while the next calls bring the same array, as writing
    does with its prefix, it is not copied again.
    """

    def __init__(self, graph: str, engine: Any, runtime: TensorRt, gpu: Gpu) -> None:
        self._graph, self._engine, self._gpu, self._runtime = graph, engine, gpu, runtime
        self._lock = threading.Lock()  # a context serves one call at a time
        api = runtime.api
        ports = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        self._dtypes = {name: np.dtype(api.nptype(engine.get_tensor_dtype(name))) for name in ports}
        reads = {name: engine.get_tensor_mode(name) == api.TensorIOMode.INPUT for name in ports}
        self.inputs = tuple(name for name in ports if reads[name])
        self.outputs = tuple(name for name in ports if not reads[name])
        shapes_of = engine.get_tensor_profile_shape
        self.profiles: tuple[Profile, ...] = tuple(
            {
                name: (tuple(least), tuple(usual), tuple(most))
                for name in self.inputs
                for least, usual, most in [shapes_of(name, index)]
            }
            for index in range(engine.num_optimization_profiles)
        )
        runtime.forget_errors()
        self._context = engine.create_execution_context()
        if self._context is None:
            raise DeviceUnavailable(
                f"the device can't hold the {graph} engine",
                seen=runtime.errors,
                hint="build the engines with lower limits: see `meiqa build --help`",
            )
        self._active = 0
        self._held: dict[str, tuple[tuple[_Shape, int], Array]] = {}
        for name, nbytes in self._largest_bytes().items():
            self._must(self._context.set_tensor_address(name, gpu.allocate(nbytes)))

    def run(self, inputs: Mapping[str, Array]) -> dict[str, NDArray[np.float32]]:
        """Execute the graph; UsageError for shapes outside every profile. See `GraphSession`."""
        fed = {
            name: np.ascontiguousarray(array, self._dtypes.get(name))
            for name, array in without_empty_axes(inputs).items()
        }
        shapes = {name: array.shape for name, array in fed.items()}
        profile = fitting_profile(self._graph, shapes, self.profiles)
        with self._lock:
            self._runtime.forget_errors()
            self._use(profile, shapes)
            for name, array in fed.items():
                self._upload(name, array)
            self._must(self._context.execute_async_v3(self._gpu.stream))
            made = {}
            for name in self.outputs:
                made[name] = np.empty(tuple(self._context.get_tensor_shape(name)), np.float32)
                self._gpu.download(made[name], self._context.get_tensor_address(name))
            self._gpu.synchronise()
        return made

    def _upload(self, name: str, array: Array) -> None:
        """Copy an input to the device unless it is what lies there."""
        held, place = self._held.pop(name, None), (array.shape, array.ctypes.data)
        if array.flags.writeable or held is None or held[0] != place:
            self._gpu.upload(self._context.get_tensor_address(name), array)
        if not array.flags.writeable:
            self._held[name] = place, array  # kept alive, so that no other can take its place

    def _largest_bytes(self) -> dict[str, int]:
        largest = dict.fromkeys((*self.inputs, *self.outputs), 0)
        for index, profile in enumerate(self.profiles):
            self._use(index, {name: greatest for name, (_, _, greatest) in profile.items()})
            for name, before in largest.items():
                shape = tuple(self._context.get_tensor_shape(name))
                nbytes = int(np.prod(shape, dtype=np.int64)) * self._dtypes[name].itemsize
                largest[name] = max(before, nbytes)
        return largest

    def _use(self, profile: int, shapes: Mapping[str, _Shape]) -> None:
        """Prepare the context for a call with these shapes, which the profile accepts."""
        if profile != self._active:
            self._must(self._context.set_optimization_profile_async(profile, self._gpu.stream))
            self._gpu.synchronise()
            self._active = profile
        for name, shape in shapes.items():
            self._must(self._context.set_input_shape(name, shape))

    def _must(self, done: bool) -> None:
        if not done:
            what = f"TensorRT failed to run the {self._graph} engine"
            raise DeviceUnavailable(what, seen=self._runtime.errors)


def open_tensorrt(package: EnginePackage, names: Sequence[str]) -> list[TensorRtSession]:
    """Load the engines of some of a package's graphs built for this device; see `open_runtime`."""
    gpu, misses = open_gpu(), []
    for runtime in installed_tensorrts():
        try:
            records = [matching_engine(package, name, runtime, gpu.capability) for name in names]
        except DeviceUnavailable as error:
            misses.append(error)
            continue
        for record in records:
            package.check(record.file, record.sha256)
        return [_opened(package, record, runtime, gpu) for record in records]
    raise misses[0]


def matching_engine(
    package: EnginePackage, graph: str, runtime: TensorRt, capability: str
) -> TensorRtEngine:
    """Give the engine of a graph for this version of TensorRT and this compute capability."""
    wanted = f"{runtime.name} {runtime.version} on compute capability {capability}"
    found = {
        f"{e.runtime} {e.version} on compute capability {e.compute_capability}": e
        for e in package.manifest.engines
        if e.graph == graph
    }
    if wanted not in found:
        raise DeviceUnavailable(
            f"the package has no {graph} engine for {wanted}",
            seen=", ".join(found) or "no engines",
            hint=f"meiqa build {package.path} --compute-capability {capability}",
        )
    return found[wanted]


def _opened(
    package: EnginePackage, record: TensorRtEngine, runtime: TensorRt, gpu: Gpu
) -> TensorRtSession:
    path, graph = package.path / record.file, package.manifest.every_graph[record.graph]
    engine = loaded_engine(path, record, runtime)
    session = TensorRtSession(record.graph, engine, runtime, gpu)
    found = (set(session.inputs), set(session.outputs), hull(session.profiles))
    if found != (set(graph.inputs), set(graph.outputs), record.profile):
        raise _damaged(path, record, "other inputs, outputs or shapes")
    return session


def loaded_engine(path: Path, record: TensorRtEngine, runtime: TensorRt) -> Any:
    """Put an engine onto the device; PackageCorrupted if TensorRT does not take it."""
    runtime.forget_errors()
    loader = runtime.api.Runtime(runtime.logger)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as read:
        engine = loader.deserialize_cuda_engine(read)
    if engine is None:
        raise _damaged(path, record, runtime.errors)
    return engine


def _damaged(path: Path, record: TensorRtEngine, seen: str) -> PackageCorrupted:
    package = path.parents[len(Path(record.file).parts) - 1]
    return PackageCorrupted(
        f"TensorRT can't use {path}",
        seen=seen,
        hint=f"meiqa build {package} --compute-capability {record.compute_capability}",
    )
