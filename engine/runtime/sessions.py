"""A package's graphs on the device that was asked for."""

from __future__ import annotations

from meiqa.engine.package import EnginePackage, check_device
from meiqa.engine.runtime.base import GraphSession


def sessions_on(
    device: str, package: EnginePackage, threads: int | None, *, verify: bool
) -> tuple[GraphSession, GraphSession]:
    """The package's graphs on a device; only the runtime that is asked for is imported."""
    check_device(device)
    if device == "tensorrt":
        from meiqa.engine.runtime.tensorrt import open_tensorrt_sessions

        return open_tensorrt_sessions(package, verify=verify)
    from meiqa.engine.runtime.onnx import open_sessions

    return open_sessions(package, device, threads)
