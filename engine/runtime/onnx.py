"""ONNX Runtime behind the seam: CPU and CUDA providers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from meiqa.engine.package import EnginePackage, Graph, check_device
from meiqa.engine.runtime.base import Array, GraphSession
from meiqa.engine.runtime.fused import with_fused_layers
from meiqa.errors import DeviceUnavailable, PackageCorrupted

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}

UNWANTED_OPTIMIZERS = ["WeightBiasQuantization"]
"""Rounds the weights of a layer between two quantised ones to 8 bits, one scale for all, where the
export measured that the layer needs more: a depthwise convolution loses a third of its signal."""


class OnnxSession:
    """A graph in ONNX Runtime on the device that was asked for, never on another."""

    def __init__(self, folder: Path, graph: Graph, device: str, threads: int | None) -> None:
        path = folder / graph.file
        provider = PROVIDERS[device]
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            self._session = onnxruntime.InferenceSession(
                path, options, providers=[provider], disabled_optimizers=UNWANTED_OPTIMIZERS
            )
        except (
            onnxruntime.capi.onnxruntime_pybind11_state.Fail,
            onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument,
            onnxruntime.capi.onnxruntime_pybind11_state.InvalidProtobuf,
            onnxruntime.capi.onnxruntime_pybind11_state.InvalidGraph,
        ) as error:
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
        return OnnxSession(package.path, package.manifest.graphs[name], device, threads)

    # Each is optimised by one thread, which takes longer than all else that opening does.
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
