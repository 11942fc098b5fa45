"""ONNX Runtime behind the seam: CPU and CUDA providers."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from meiqa.engine.manifest import Graph
from meiqa.engine.package import EnginePackage, check_device
from meiqa.engine.runtime.base import Array, GraphSession
from meiqa.engine.runtime.fused import with_fused_layers
from meiqa.engine.runtime.optimised import LARGEST_BYTES, KeptGraph, processor
from meiqa.errors import DeviceUnavailable, PackageCorrupted, one_line

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}

UNWANTED_OPTIMIZERS = ["WeightBiasQuantization"]
"""Rounds the weights of a layer between two quantised ones to 8 bits, one scale for all, where the
export measured that the layer needs more: a depthwise convolution loses a third of its signal."""


LOG = logging.getLogger(__name__)
_STATE = onnxruntime.capi.onnxruntime_pybind11_state
UNLOADABLE = (_STATE.Fail, _STATE.InvalidArgument, _STATE.InvalidProtobuf, _STATE.InvalidGraph)
"""What ONNX Runtime raises for a file that holds no graph of its own."""


SPIN_US = "100"
"""How long a thread without work looks for some before it sleeps: from one node to the next."""


class OnnxSession:
    """A graph in ONNX Runtime on the device that was asked for, never on another.

    Args:
        kept: where the optimised graph is kept for later processes, if it is.
    """

    def __init__(
        self,
        folder: Path,
        graph: Graph,
        device: str,
        threads: int | None,
        kept: KeptGraph | None = None,
    ) -> None:
        path = folder / graph.file
        provider = PROVIDERS[device]
        try:
            self._session = opened_session(path, provider, threads, kept)
        except UNLOADABLE as error:
            raise PackageCorrupted(
                f"ONNX Runtime can't load {path}",
                seen=str(error).splitlines()[0],
                hint="export the package again",
            ) from error
        if provider not in self._session.get_providers():
            raise missing_device(device)
        inputs = [value.name for value in self._session.get_inputs()]
        self._outputs = [value.name for value in self._session.get_outputs()]
        check_names(path, "inputs", inputs, graph.inputs)
        check_names(path, "outputs", self._outputs, graph.outputs)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, NDArray[np.float32]]:
        """Execute the graph; see `GraphSession`."""
        return dict(zip(self._outputs, self._session.run(None, dict(inputs)), strict=True))


def session_options(threads: int | None) -> onnxruntime.SessionOptions:
    """Options of every session.

    Threads of a session spin for a while when they are made and after each answer, in the way of
    the other session's and of the kernels' threads: that took a third of a photo's time.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_session_config_entry("session.intra_op.spin_duration_us", SPIN_US)
    if threads is not None:
        options.intra_op_num_threads = threads
    return options


def opened_session(
    path: Path, provider: str, threads: int | None, kept: KeptGraph | None
) -> onnxruntime.InferenceSession:
    """A session of a graph: as it was optimised before, if it was kept; otherwise kept now."""
    if kept is not None:
        session = from_kept(kept, threads) or optimised_and_kept(path, threads, kept)
        if session is not None:
            return session
    return onnxruntime.InferenceSession(
        path,
        session_options(threads),
        providers=[provider],
        disabled_optimizers=UNWANTED_OPTIMIZERS,
    )


def from_kept(kept: KeptGraph, threads: int | None) -> onnxruntime.InferenceSession | None:
    """A session of a graph that was optimised before; None if there is none."""
    graph = kept.read()
    if graph is None:
        return None
    options = session_options(threads)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return onnxruntime.InferenceSession(graph, options, providers=[PROVIDERS["cpu"]])
    except Exception as error:  # whatever it is, the graph itself can still be opened
        LOG.warning("%s is optimised anew: %s", kept.path, one_line(str(error)))
        return None


def optimised_and_kept(
    path: Path, threads: int | None, kept: KeptGraph
) -> onnxruntime.InferenceSession | None:
    """A session of a graph that is optimised now, and kept; None where that can't be done."""
    unfinished = kept.begin()
    if unfinished is None:
        return None
    options = session_options(threads)
    options.optimized_model_filepath = str(unfinished)
    options.add_session_config_entry("session.save_model_format", "ORT")
    try:
        session = onnxruntime.InferenceSession(
            path,
            options,
            providers=[PROVIDERS["cpu"]],
            disabled_optimizers=UNWANTED_OPTIMIZERS,
        )
        kept.keep(unfinished)
    except Exception as error:  # a fault of the graph's own shows again without writing
        LOG.debug("%s is not kept: %s", kept.path, error)
        return None
    finally:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
    return session


def kept_graph(package: EnginePackage, name: str) -> KeptGraph | None:
    """Where a package's graph is kept once it is optimised for this CPU.

    None if it is large, or the system does not tell what CPU this is.
    """
    graph = package.path / package.manifest.graphs[name].file
    stored = [file.stat() for file in sorted(graph.parent.glob(f"{graph.name}*"))]
    if sum(each.st_size for each in stored) > LARGEST_BYTES:
        return None
    # Files that are not what the digest says, in a package that was not verified, are others.
    files = [f"{each.st_size} {each.st_mtime_ns}" for each in stored]
    if (cpu := processor()) is None:
        return None
    return KeptGraph(
        (package.digest, name, *files, onnxruntime.__version__, *UNWANTED_OPTIMIZERS, cpu)
    )


def open_sessions(
    package: EnginePackage, device: str, threads: int | None
) -> tuple[GraphSession, GraphSession]:
    """Load the vision and the decoder graph; on a CPU with the decoder's fused layers, if any.

    Raises:
        UsageError: unknown device name.
        DeviceUnavailable: the device is not there, or the installed runtime can't use it.
        PackageCorrupted: a graph can't be loaded or has another interface than the manifest says.
    """
    check_device(device)
    if PROVIDERS[device] not in onnxruntime.get_available_providers():
        raise missing_device(device)

    def opened(name: str) -> OnnxSession:
        kept = kept_graph(package, name) if device == "cpu" else None
        return OnnxSession(package.path, package.manifest.graphs[name], device, threads, kept)

    # The first time each is optimised by one thread, which takes longer than the rest of opening.
    with ThreadPoolExecutor(1) as beside:
        pending = beside.submit(opened, "decoder")
        vision, decoder = opened("vision"), pending.result()
    return vision, with_fused_layers(decoder, package, threads) if device == "cpu" else decoder


def check_names(path: Path, kind: str, found: Sequence[str], listed: Iterable[str]) -> None:
    """Refuse a graph whose inputs or outputs, in any order, are not those that the manifest lists.

    Raises:
        PackageCorrupted: they are others.
    """
    if sorted(found) != sorted(listed):
        raise PackageCorrupted(
            f"{path} has other {kind} than its manifest says",
            seen=", ".join(found),
            allowed=", ".join(listed),
            hint="export the package again",
        )


def missing_device(device: str) -> DeviceUnavailable:
    """The error for a device that can't be used here."""
    return DeviceUnavailable(
        f"device {device!r} can't be used here",
        seen=", ".join(onnxruntime.get_available_providers()),
        hint="install meiqa[gpu] in an environment without meiqa[cpu], or use --device cpu",
    )
