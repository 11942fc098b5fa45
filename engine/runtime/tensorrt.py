"""TensorRT behind the seam: engines that `meiqa build` made beforehand, never built at run time.

`tensorrt` and `tensorrt_rtx` have one Python interface; whichever is installed is taken. An engine
belongs to one version of one of them and to one compute capability, and it accepts the shapes of
its optimisation profiles only: everything else is refused before the device is touched.

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

from meiqa.engine.manifest import GRAPHS, PATTERNS, Profile, TensorRtEngine
from meiqa.engine.package import EnginePackage
from meiqa.engine.runtime.base import Array
from meiqa.errors import DeviceUnavailable, PackageCorrupted, UsageError

RUNTIMES = ("tensorrt_rtx", "tensorrt")
"""Import names, in the order of preference: the first is on PyPI and builds without a GPU."""
MASKED_WHEN_EMPTY = frozenset({"prefix", "past"})
"""Inputs whose real length the graph is told, so that an entry too many does no harm."""

_log = logging.getLogger(__name__)
_Shape = tuple[int, ...]


@dataclass(frozen=True)
class TensorRt:
    """An installed TensorRT.

    Attributes:
        name: its import name; version: its version.
        api: the module.
        logger: its only logger, which keeps the last errors in `errors`.
    """

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
    """Every TensorRT that is installed, in the order of preference.

    Raises:
        DeviceUnavailable: none is.
    """
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
            hint="pip install meiqa[rtx]",
        )
    return found


def load_tensorrt() -> TensorRt:
    """Take `tensorrt_rtx` or `tensorrt`, whichever is installed.

    Raises:
        DeviceUnavailable: neither is.
    """
    return installed_tensorrts()[0]


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
        self.capability = ".".join(
            str(self._call(cudart.cudaDeviceGetAttribute(attribute, 0)))
            for attribute in (
                attributes.cudaDevAttrComputeCapabilityMajor,
                attributes.cudaDevAttrComputeCapabilityMinor,
            )
        )
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
        kind = self._cudart.cudaMemcpyKind.cudaMemcpyHostToDevice
        source = array.ctypes.data
        copied = self._cudart.cudaMemcpyAsync(address, source, array.nbytes, kind, self.stream)
        self._call(copied)

    def download(self, array: NDArray[np.float32], address: int) -> None:
        """Copy from the device into a contiguous array, which is filled after `synchronise`."""
        kind = self._cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost
        target = array.ctypes.data
        self._call(self._cudart.cudaMemcpyAsync(target, address, array.nbytes, kind, self.stream))

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
    """Open the first CUDA device.

    Raises:
        DeviceUnavailable: there is none, its driver is missing, or CUDA's Python package is.
    """
    try:
        cudart = importlib.import_module("cuda.bindings.runtime")
    except ImportError as error:
        raise DeviceUnavailable(
            "CUDA's Python package is not installed", seen=error, hint="pip install meiqa[rtx]"
        ) from error
    return Gpu(cudart)


def hull(profiles: Sequence[Profile]) -> Profile:
    """The least profile that holds all of them; what is usual in it is usual in the first."""

    def extreme(choose: Any, name: str, end: int) -> _Shape:
        columns = zip(*(profile[name][end] for profile in profiles), strict=True)
        return tuple(choose(column) for column in columns)

    return {
        name: (extreme(min, name, 0), shapes[1], extreme(max, name, 2))
        for name, shapes in profiles[0].items()
    }


def fitting_profile(graph: str, shapes: Mapping[str, _Shape], profiles: Sequence[Profile]) -> int:
    """Index of the first profile that accepts all shapes.

    Args:
        graph: what the message calls the engine.
        shapes: of every input.
        profiles: what the engine accepts.

    Raises:
        UsageError: none does, or these are not the engine's inputs.
    """
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
    everywhere = [name for name in shapes if all(name in names for names in refused)]
    # Without one input that no profile takes it is the combination, and each profile names one.
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


def _triple(shapes: Sequence[Sequence[int]]) -> tuple[_Shape, _Shape, _Shape]:
    least, usual, greatest = map(tuple, shapes)
    return least, usual, greatest


def without_empty_axes(inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Replace an empty prefix or past by one entry of zeros, which the graph masks."""
    return {
        name: np.zeros([extent or 1 for extent in array.shape], array.dtype)
        if name in MASKED_WHEN_EMPTY and array.size == 0
        else array
        for name, array in inputs.items()
    }


def _is_same(held: Array, array: Array) -> bool:
    """Whether a contiguous read-only array is the one held, perhaps through another view."""
    return (
        not array.flags.writeable
        and held.shape == array.shape
        and held.ctypes.data == array.ctypes.data
    )


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
        self.profiles: tuple[Profile, ...] = tuple(
            {name: _triple(engine.get_tensor_profile_shape(name, index)) for name in self.inputs}
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
        self._held: dict[str, Array] = {}
        for name, nbytes in self._largest_bytes().items():
            self._must(self._context.set_tensor_address(name, gpu.allocate(nbytes)))

    def run(self, inputs: Mapping[str, Array]) -> dict[str, NDArray[np.float32]]:
        """Execute the graph; see `GraphSession`.

        Raises:
            UsageError: a shape is outside every profile.
            DeviceUnavailable: the device failed.
        """
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
        held = self._held.pop(name, None)
        if held is None or not _is_same(held, array):
            self._gpu.upload(self._context.get_tensor_address(name), array)
        if not array.flags.writeable:
            self._held[name] = array  # kept alive, so that no other array can take its place

    def _largest_bytes(self) -> dict[str, int]:
        """Bytes that every input and output takes at most."""
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
            raise DeviceUnavailable(
                f"TensorRT failed to run the {self._graph} engine",
                seen=self._runtime.errors,
            )


def open_tensorrt_sessions(
    package: EnginePackage, *, verify: bool = True
) -> tuple[TensorRtSession, TensorRtSession]:
    """Load the vision and the decoder engine that were built for this device.

    Args:
        package: opened package with engines.
        verify: compare their SHA-256 with the manifest's.

    Raises:
        DeviceUnavailable: no TensorRT, no device, or no engine for them in the package.
        PackageCorrupted: an engine is damaged or not the one that the manifest describes.
    """
    gpu = open_gpu()
    runtime, records = _engines_for(package, installed_tensorrts(), gpu.capability)
    for record in records:
        package.check(record.file, record.sha256 if verify else None)
    vision, decoder = (_opened(package, record, runtime, gpu) for record in records)
    return vision, decoder


def open_tensorrt_patterns(package: EnginePackage, *, verify: bool = True) -> TensorRtSession:
    """Load the distortion patterns' engine; see `open_tensorrt_sessions`."""
    gpu = open_gpu()
    runtime, (record,) = _engines_for(package, installed_tensorrts(), gpu.capability, (PATTERNS,))
    package.check(record.file, record.sha256 if verify else None)
    return _opened(package, record, runtime, gpu)


def _engines_for(
    package: EnginePackage,
    runtimes: Sequence[TensorRt],
    capability: str,
    graphs: Sequence[str] = GRAPHS,
) -> tuple[TensorRt, list[TensorRtEngine]]:
    """The first of the runtimes that the package has all engines for, and those engines."""
    misses = []
    for runtime in runtimes:
        try:
            return runtime, [
                matching_engine(package, graph, runtime, capability) for graph in graphs
            ]
        except DeviceUnavailable as error:
            misses.append(error)
    raise misses[0]


def matching_engine(
    package: EnginePackage, graph: str, runtime: TensorRt, capability: str
) -> TensorRtEngine:
    """The engine of a graph for this version of TensorRT and this compute capability.

    Raises:
        DeviceUnavailable: there is none.
    """
    engines = [engine for engine in package.manifest.engines if engine.graph == graph]
    wanted = (runtime.name, runtime.version, capability)
    for engine in engines:
        if (engine.runtime, engine.version, engine.compute_capability) == wanted:
            return engine
    raise DeviceUnavailable(
        f"the package has no {graph} engine for {_described(*wanted)}",
        seen=", ".join(_described(e.runtime, e.version, e.compute_capability) for e in engines)
        or "no engines",
        hint=f"meiqa build {package.path} --compute-capability {capability}",
    )


def _described(runtime: str, version: str, capability: str) -> str:
    return f"{runtime} {version} on compute capability {capability}"


def _opened(
    package: EnginePackage, record: TensorRtEngine, runtime: TensorRt, gpu: Gpu
) -> TensorRtSession:
    session = TensorRtSession(
        record.graph, loaded_engine(package.path / record.file, record, runtime), runtime, gpu
    )
    graph = package.manifest.every_graph[record.graph]
    as_recorded = (set(graph.inputs), set(graph.outputs), record.profile)
    if (set(session.inputs), set(session.outputs), hull(session.profiles)) != as_recorded:
        raise _damaged(package.path / record.file, record, "other inputs, outputs or shapes")
    return session


def loaded_engine(path: Path, record: TensorRtEngine, runtime: TensorRt) -> Any:
    """Put an engine onto the device.

    Raises:
        PackageCorrupted: TensorRT does not take it.
    """
    runtime.forget_errors()
    loader = runtime.api.Runtime(runtime.logger)
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as serialised,
    ):
        engine = loader.deserialize_cuda_engine(serialised)
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
