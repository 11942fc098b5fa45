"""The TensorRT session: what it refuses, and that it feeds and reads its engines rightly.

Without a GPU the engine, its context and the device's memory are stand-ins: the memory is the
host's and ONNX Runtime computes. Tests marked `gpu` run real engines.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest

from meiqa.engine.local import LocalModel
from meiqa.engine.manifest import GRAPHS, Profile, TensorRtEngine
from meiqa.engine.package import EnginePackage, file_digest
from meiqa.engine.runtime import tensorrt
from meiqa.engine.runtime.decoder import GraphDecoder, GraphSession
from meiqa.engine.runtime.onnx import OnnxSession
from meiqa.engine.runtime.tensorrt import (
    Gpu,
    TensorRt,
    TensorRtSession,
    fitting_profile,
    hull,
    installed_tensorrts,
    matching_engine,
    open_gpu,
    open_tensorrt,
    without_empty_axes,
)
from meiqa.errors import DeviceUnavailable, PackageCorrupted, UsageError, install_hint
from meiqa.export import engines
from meiqa.export.engines import Limits, decoder_profiles, vision_profiles
from meiqa.locations import embedded_assets
from tests.engine.samples import PHOTOS, seen


@pytest.fixture(scope="module")
def package() -> EnginePackage:
    """The embedded default model."""
    return EnginePackage.open(embedded_assets() / "package")


SHARED: Profile = {"x": ((1, 1, 4), (1, 8, 4), (1, 8, 4)), "n": ((1,), (1,), (1,))}
PAIRED: Profile = {"x": ((1, 1, 4), (8, 1, 4), (8, 1, 4)), "n": ((1,), (8,), (8,))}


def engine_record(package: EnginePackage, graph: str, **changes: Any) -> TensorRtEngine:
    """A record of an engine whose file holds three bytes."""
    made = TensorRtEngine(
        graph=graph,
        file=f"engines/{graph}.engine",
        sha256="ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
        runtime="tensorrt_rtx",
        version="1.7.0",
        compute_capability="8.9",
        precision="int8",
        profile=SHARED,
        size_bytes=3,
        build_s=1.0,
    )
    return replace(made, **changes)


def model_on(package: EnginePackage, vision: GraphSession, decoder: GraphSession) -> LocalModel:
    """A package's model over two graph sessions."""
    return LocalModel(package, vision, GraphDecoder(decoder, package.manifest.decoder))


class TestShapes:
    @pytest.mark.parametrize(
        ("shapes", "index"),
        [
            ({"x": (1, 8, 4), "n": (1,)}, 0),
            ({"x": (1, 1, 4), "n": (1,)}, 0),
            ({"x": (8, 1, 4), "n": (8,)}, 1),
        ],
    )
    def test_the_first_profile_that_holds_them_is_taken(
        self, shapes: dict[str, tuple[int, ...]], index: int
    ) -> None:
        assert fitting_profile("decoder", shapes, [SHARED, PAIRED]) == index

    @pytest.mark.parametrize(
        "shapes",
        [
            {"x": (1, 9, 4), "n": (1,)},
            {"x": (2, 2, 4), "n": (2,)},
            {"x": (1, 0, 4), "n": (1,)},
            {"x": (1, 8, 5), "n": (1,)},
            {"x": (8, 4), "n": (1,)},
        ],
        ids=str,
    )
    def test_others_are_refused_with_name_shape_and_profiles(
        self, shapes: dict[str, tuple[int, ...]]
    ) -> None:
        with pytest.raises(UsageError) as caught:
            fitting_profile("decoder", shapes, [SHARED, PAIRED])
        message = str(caught.value)
        assert "decoder" in message
        assert f"x {shapes['x']}" in message
        assert "(1, 1, 4) to (1, 8, 4)" in message
        assert "(1, 1, 4) to (8, 1, 4)" in message
        assert "meiqa build" in message

    def test_inputs_that_fit_no_profile_together(self) -> None:
        with pytest.raises(UsageError, match=r"x, n; got x \(8, 1, 4\), n \(9,\).* n \(1,\) to"):
            fitting_profile(
                "decoder",
                {"x": (8, 1, 4), "n": (9,)},
                [{**SHARED, "n": ((1,), (9,), (9,))}, PAIRED],
            )

    def test_other_inputs(self) -> None:
        with pytest.raises(UsageError, match="other inputs; got y; allowed: x, n"):
            fitting_profile("decoder", {"y": (1,)}, [SHARED])

    def test_the_hull_holds_every_profile(self) -> None:
        assert hull([SHARED, PAIRED]) == {
            "x": ((1, 1, 4), (1, 8, 4), (8, 8, 4)),
            "n": ((1,), (1,), (8,)),
        }

    def test_only_an_empty_prefix_or_past_is_filled(self) -> None:
        inputs = {
            "prefix": np.ones((2, 0, 3), np.float32),
            "past": np.ones((2, 5), np.float32),
            "embeds": np.ones((1, 0), np.float32),
        }
        filled = without_empty_axes(inputs)
        assert filled["prefix"].shape == (2, 1, 3)
        assert not filled["prefix"].any()
        assert filled["past"] is inputs["past"]
        assert filled["embeds"] is inputs["embeds"]


class TestWhatIsInstalled:
    def test_no_tensorrt(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tensorrt, "_imported", _missing)
        with pytest.raises(DeviceUnavailable, match=f"TensorRT.*{re.escape(install_hint('rtx'))}"):
            installed_tensorrts()[0]

    def test_no_cuda_bindings(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("cuda", "cuda.bindings", "cuda.bindings.runtime"):
            monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(DeviceUnavailable, match=f"CUDA.*{re.escape(install_hint('rtx'))}"):
            open_gpu()

    def test_a_driver_that_is_missing(self) -> None:
        with pytest.raises(DeviceUnavailable, match="driver is too old") as caught:
            Gpu(
                SimpleNamespace(
                    cudaGetDeviceCount=lambda: (35, None),
                    cudaGetErrorString=lambda status: (0, b"driver is too old"),
                )
            )
        assert "\n" not in str(caught.value)

    def test_a_machine_without_device(self) -> None:
        with pytest.raises(DeviceUnavailable, match="no CUDA device"):
            Gpu(SimpleNamespace(cudaGetDeviceCount=lambda: (0, 0)))


def _missing(name: str) -> TensorRt:
    raise ModuleNotFoundError(f"No module named {name!r}")


RUNTIME = TensorRt("tensorrt_rtx", "1.7.0", None, None)


class TestRecords:
    def test_version_runtime_and_capability_decide(self, package: EnginePackage) -> None:
        right = engine_record(package, "vision")
        others = [
            engine_record(package, "decoder"),
            engine_record(package, "vision", version="1.6.0"),
            engine_record(package, "vision", runtime="tensorrt"),
            engine_record(package, "vision", compute_capability="8.6"),
        ]
        held = EnginePackage(package.path, replace(package.manifest, engines=(*others, right)))
        assert matching_engine(held, "vision", RUNTIME, "8.9") is right

    @pytest.mark.parametrize(
        "changes", [{"version": "1.6.0"}, {"runtime": "tensorrt"}, {"compute_capability": "8.6"}]
    )
    def test_what_is_there_is_named_with_the_command(
        self, package: EnginePackage, changes: dict[str, str]
    ) -> None:
        other = engine_record(package, "vision", **changes)
        held = EnginePackage(package.path, replace(package.manifest, engines=(other,)))
        with pytest.raises(DeviceUnavailable) as caught:
            matching_engine(held, "vision", RUNTIME, "8.9")
        message = str(caught.value)
        assert "tensorrt_rtx 1.7.0 on compute capability 8.9" in message
        assert all(value in message for value in changes.values())
        assert f"meiqa build {package.path} --compute-capability 8.9" in message

    def test_no_engines_at_all(self, package: EnginePackage) -> None:
        held = EnginePackage(package.path, replace(package.manifest, engines=()))
        with pytest.raises(DeviceUnavailable, match="no engines"):
            matching_engine(held, "decoder", RUNTIME, "8.9")


# --- Stand-ins ----------------------------------------------------------------------------------


class HostCuda:
    """CUDA's runtime with the host's memory; reading or writing past a block fails."""

    cudaDeviceAttr = SimpleNamespace(  # noqa: N815 - CUDA's name
        cudaDevAttrComputeCapabilityMajor=0, cudaDevAttrComputeCapabilityMinor=1
    )
    cudaMemcpyKind = SimpleNamespace(  # noqa: N815
        cudaMemcpyHostToDevice="up", cudaMemcpyDeviceToHost="down"
    )

    def __init__(self) -> None:
        self.blocks: dict[int, Any] = {}

    def cudaGetDeviceCount(self) -> tuple[int, int]:  # noqa: N802
        return 0, 1

    def cudaDeviceGetAttribute(self, attribute: int, device: int) -> tuple[int, int]:  # noqa: N802
        return 0, (8, 9)[attribute]

    def cudaStreamCreate(self) -> tuple[int, int]:  # noqa: N802
        return 0, 7

    def cudaStreamSynchronize(self, stream: int) -> tuple[int]:  # noqa: N802
        return (0,)

    def cudaMalloc(self, nbytes: int) -> tuple[int, int]:  # noqa: N802
        block = ctypes.create_string_buffer(nbytes)
        self.blocks[ctypes.addressof(block)] = block
        return 0, ctypes.addressof(block)

    def cudaFree(self, address: int) -> tuple[int]:  # noqa: N802
        del self.blocks[address]
        return (0,)

    def cudaMemcpyAsync(  # noqa: N802
        self, target: int, source: int, nbytes: int, kind: str, stream: int
    ) -> tuple[int]:
        assert nbytes <= len(self.blocks[target if kind == "up" else source])
        ctypes.memmove(target, source, nbytes)
        return (0,)


def test_the_device_is_asked_for_its_capability_and_gets_its_memory_back() -> None:
    cuda = HostCuda()
    gpu = Gpu(cuda)
    sent, back = np.arange(6, dtype=np.float32), np.zeros(6, np.float32)
    address = gpu.allocate(sent.nbytes)
    gpu.upload(address, sent)
    gpu.download(back, address)
    gpu.synchronise()
    assert gpu.capability == "8.9"
    assert (sent == back).all()
    del gpu
    assert cuda.blocks == {}


class StandIn:
    """Engine and execution context in one, computing with ONNX Runtime."""

    def __init__(self, path: Path, profiles: list[Profile]) -> None:
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        self.reads = {value.name: value for value in self.session.get_inputs()}
        self.ports = [*self.reads, *(value.name for value in self.session.get_outputs())]
        self.profiles = profiles
        self.num_optimization_profiles = len(profiles)
        self.num_io_tensors = len(self.ports)
        self.addresses: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.used: list[int] = []
        self.active = 0
        self.get_tensor_name = self.ports.__getitem__
        self.get_tensor_mode = lambda name: name in self.reads
        self.get_tensor_address = self.addresses.__getitem__

    def get_tensor_dtype(self, name: str) -> str:
        return "int64" if name in self.reads and "int64" in self.reads[name].type else "float32"

    def get_tensor_profile_shape(self, name: str, index: int) -> list[list[int]]:
        return [list(shape) for shape in self.profiles[index][name]]

    def create_execution_context(self) -> StandIn:
        return self

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.active = index
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        least, _, greatest = self.profiles[self.active][name]
        self.shapes[name] = tuple(shape)
        return all(a <= x <= b for a, x, b in zip(least, shape, greatest, strict=True))

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name in self.shapes:
            return self.shapes[name]
        if "cells" in self.shapes:
            height, width, _ = self.shapes["cells"]
            return height * width, 256
        p, r, s, width = self.shapes["embeds"]
        layers, two, _, heads, _, head = self.shapes["prefix"]
        vocabulary = next(o.shape[-1] for o in self.session.get_outputs() if o.name == "logits")
        return {
            "logits": (p, r, self.shapes["logit_positions"][2], vocabulary),
            "hidden": (p, r, s, width),
            "key_values": (layers, two, p, heads, r, s, head),
        }[name]

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        self.used.append(self.active)
        feed = {name: self._at(name, self.get_tensor_dtype(name)).copy() for name in self.reads}
        outputs = [value.name for value in self.session.get_outputs()]
        for name, made in zip(outputs, self.session.run(outputs, feed), strict=True):
            self._at(name, "float32")[...] = made
        return True

    def _at(self, name: str, dtype: str) -> np.ndarray:
        shape = self.get_tensor_shape(name)
        count = int(np.prod(shape)) * np.dtype(dtype).itemsize
        memory = (ctypes.c_char * count).from_address(self.addresses[name])
        return np.frombuffer(memory, dtype).reshape(shape)


STANDING_IN = TensorRt(
    "tensorrt_rtx",
    "1.7.0",
    SimpleNamespace(nptype=np.dtype, TensorIOMode=SimpleNamespace(INPUT=True)),
    SimpleNamespace(errors=[]),
)
Opener = Callable[[str], tuple[TensorRtSession, StandIn]]


@pytest.fixture
def open_session(package: EnginePackage) -> Opener:
    profiles = {
        "vision": vision_profiles(package),
        "decoder": decoder_profiles(package, Limits()),
    }

    def opened(graph: str) -> tuple[TensorRtSession, StandIn]:
        file = package.path / package.manifest.graphs[graph].file
        stand_in = StandIn(file, profiles[graph])
        return TensorRtSession(graph, stand_in, STANDING_IN, Gpu(HostCuda())), stand_in

    return opened


class OrtOnly:
    """What the graph of a session with a stand-in gives, past the session."""

    def __init__(self, session: TensorRtSession) -> None:
        self.session: onnxruntime.InferenceSession = session._engine.session

    def __call__(self, cells: np.ndarray) -> np.ndarray:
        made: np.ndarray = self.session.run(None, {"cells": cells})[0]
        return made


class TestSession:
    def test_a_model_behind_it_is_the_model_on_the_cpu(
        self, package: EnginePackage, open_session: Opener
    ) -> None:
        """Empty prefixes and pasts, all three calls and every profile, through `LocalModel`."""
        vision, _ = open_session("vision")
        decoder, calls = open_session("decoder")
        ours = model_on(package, vision, decoder)
        # The graphs themselves: the native decoder rounds in another order.
        graphs = (package.manifest.graphs[name] for name in ("vision", "decoder"))
        theirs = model_on(package, *(OnnxSession(package.path, g, "cpu", 1) for g in graphs))
        answers = []
        for vlm, pairs in ((ours, 3), (theirs, 1)):  # one profile takes one prefix at a time
            prefixes = vlm.prefill([seen(vlm, photo) for photo in PHOTOS[:3]])
            tokens = [prefix.tokens for prefix in prefixes]
            answers.append(
                (
                    vlm.grade(prefixes[0]),
                    vlm.prefer_first(prefixes[:1], tokens),
                    np.concatenate(
                        [
                            vlm.prefer_first(
                                prefixes[at : at + pairs], tokens[::-1][at : at + pairs]
                            )
                            for at in range(0, 3, pairs)
                        ]
                    ),
                    vlm.describe(prefixes[0], 8).text,
                )
            )
        for made, wanted in zip(*answers[0:2], strict=True):
            if isinstance(made, str):
                assert made == wanted
            else:
                np.testing.assert_allclose(made, wanted, atol=1e-5)
        assert set(calls.used) == {0, 1, 2}

    def test_a_shape_outside_is_refused_before_the_device_is_touched(
        self, open_session: Opener
    ) -> None:
        session, calls = open_session("vision")
        with pytest.raises(
            UsageError, match=r"vision.*cells.*\(65, 1, 12288\).*\(1, 1, 12288\) to"
        ):
            session.run({"cells": np.zeros((65, 1, 12288), np.float32)})
        assert calls.used == []

    def test_only_a_read_only_input_is_not_copied_twice(
        self, open_session: Opener, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        session, _ = open_session("vision")
        theirs = OrtOnly(session)
        random = np.random.default_rng(0)
        writeable = random.normal(size=(2, 2, 12288)).astype(np.float32)
        first, second = (writeable + step for step in (1, 2))
        for array in (first, second):
            array.flags.writeable = False
        copied: list[int] = []
        upload = Gpu.upload

        def counted(gpu: Gpu, address: int, array: np.ndarray) -> None:
            copied.append(address)
            upload(gpu, address, array)

        monkeypatch.setattr(Gpu, "upload", counted)
        calls = [
            (writeable, 1),
            (writeable, 1),
            (first, 1),
            (first[:], 0),
            (first[:, :1], 1),
            (first, 1),
            (second, 1),
            (first, 1),
            (writeable, 1),
            (first, 1),
        ]
        for array, wanted in calls:
            copied.clear()
            made = session.run({"cells": array})["tokens"]
            assert len(copied) == wanted
            np.testing.assert_array_equal(made, theirs(array))
            writeable += 1

    def test_a_device_that_fails(
        self, open_session: Opener, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        session, calls = open_session("vision")
        monkeypatch.setattr(calls, "execute_async_v3", lambda stream: False)
        with pytest.raises(DeviceUnavailable, match="vision"):
            session.run({"cells": np.zeros((2, 2, 12288), np.float32)})


class TestOpening:
    """From the manifest's records to sessions, with engines that hold the bytes "abc"."""

    @pytest.fixture
    def recorded(
        self, package: EnginePackage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> EnginePackage:
        profiles = {
            "vision": vision_profiles(package),
            "decoder": decoder_profiles(package, Limits()),
        }
        records = tuple(
            engine_record(package, graph, profile=hull(profiles[graph])) for graph in profiles
        )
        (tmp_path / "engines").mkdir()
        for record in records:
            (tmp_path / record.file).write_bytes(b"abc")

        def loaded(path: Path, record: TensorRtEngine, runtime: TensorRt) -> StandIn:
            file = package.path / package.manifest.graphs[record.graph].file
            return StandIn(file, profiles[record.graph])

        monkeypatch.setattr(tensorrt, "_imported", lambda name: STANDING_IN)
        monkeypatch.setattr(tensorrt, "open_gpu", lambda: Gpu(HostCuda()))
        monkeypatch.setattr(tensorrt, "loaded_engine", loaded)
        return EnginePackage(tmp_path, replace(package.manifest, engines=records))

    def test_vision_and_decoder(self, recorded: EnginePackage) -> None:
        vision, decoder = open_tensorrt(recorded, GRAPHS)
        assert vision.outputs == ("tokens",)
        assert decoder.outputs == ("logits", "hidden", "key_values")
        assert vision.run({"cells": np.zeros((2, 3, 12288), np.float32)})["tokens"].shape == (
            6,
            256,
        )

    def test_a_changed_file(self, recorded: EnginePackage) -> None:
        (recorded.path / "engines" / "decoder.engine").write_bytes(b"abd")
        with pytest.raises(PackageCorrupted, match=r"decoder\.engine.*SHA-256"):
            open_tensorrt(recorded, GRAPHS)

    def test_an_engine_of_other_shapes_than_recorded(self, recorded: EnginePackage) -> None:
        vision, decoder = recorded.manifest.engines
        narrow = replace(vision, profile={"cells": ((1, 1, 12288),) * 3})
        other = replace(recorded.manifest, engines=(narrow, decoder))
        with pytest.raises(PackageCorrupted, match=r"vision\.engine.*shapes.*meiqa build"):
            open_tensorrt(EnginePackage(recorded.path, other), GRAPHS)

    def test_a_package_without_engines(
        self, package: EnginePackage, recorded: EnginePackage
    ) -> None:
        none = EnginePackage(package.path, replace(package.manifest, engines=()))
        with pytest.raises(DeviceUnavailable, match=r"no engines.*--compute-capability 8\.9"):
            open_tensorrt(none, GRAPHS)


# --- With a GPU ---------------------------------------------------------------------------------


@pytest.fixture
def built(package: EnginePackage, tmp_path: Path) -> EnginePackage:
    """A copy of the package with engines for the device that is here."""
    try:
        runtime = installed_tensorrts()[0]
        capability = open_gpu().capability
    except DeviceUnavailable as error:
        pytest.skip(str(error))
    if capability not in engines.buildable(runtime):
        pytest.skip(f"{runtime.name} has no engines for compute capability {capability}")
    copy = Path(shutil.copytree(package.path, tmp_path / "package"))
    engines.build_engines(copy, [capability])
    return EnginePackage.open(copy)


@pytest.mark.gpu
def test_real_engines_agree_with_the_cpu(built: EnginePackage) -> None:
    ours = model_on(built, *open_tensorrt(built, GRAPHS))
    theirs = LocalModel.open(built, "cpu", 1)
    results = []
    for vlm in (ours, theirs):
        prefixes = vlm.prefill([seen(vlm, photo) for photo in PHOTOS])
        tokens = [prefix.tokens for prefix in prefixes]
        paired = vlm.prefer_first(prefixes, tokens[::-1])
        results.append([*vlm.grade(prefixes[0]), *vlm.prefer_first(prefixes[:1], tokens), *paired])
    np.testing.assert_allclose(*results, atol=0.1)  # both INT8, with other steps


@pytest.mark.gpu
def test_real_engines_refuse_other_shapes(built: EnginePackage) -> None:
    vision, _ = open_tensorrt(built, GRAPHS)
    with pytest.raises(UsageError, match="cells"):
        vision.run({"cells": np.zeros((65, 65, 12288), np.float32)})


@pytest.mark.gpu
def test_a_damaged_engine_is_refused(built: EnginePackage) -> None:
    file = built.path / built.manifest.engines[0].file
    file.write_bytes(b"damaged")
    with pytest.raises(PackageCorrupted, match=file.name):
        open_tensorrt(built, GRAPHS)
    first, *others = built.manifest.engines
    listed = replace(first, sha256=file_digest(file))
    manifest = replace(built.manifest, engines=(listed, *others))
    with pytest.raises(PackageCorrupted, match="meiqa build"):
        open_tensorrt(EnginePackage(built.path, manifest), GRAPHS)
