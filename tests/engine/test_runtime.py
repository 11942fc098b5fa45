"""The runtime runs on the device that was asked for, or says why not."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from meiqa.engine import runtime
from meiqa.engine.engine import Engine
from meiqa.engine.package import EnginePackage
from meiqa.engine.runtime import Way, open_graphs, open_runtime, usable_threads
from meiqa.engine.runtime.decoder import (
    GraphDecoder,
    GraphSession,
    NativeDecoder,
    comparisons,
    fastest,
    layers_beside,
)
from meiqa.errors import DeviceUnavailable, PackageCorrupted, StoreMismatch, UsageError
from meiqa.kernels.cores import usable_cores
from meiqa.kernels.decoder import FASTEST_IN_BF16, KERNELS
from meiqa.locations import embedded_assets
from tests.engine.samples import relative_difference


def test_cuda_where_there_is_none(
    package: EnginePackage, anchors: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(DeviceUnavailable, match=r"cuda.*CPUExecutionProvider.*--device cpu"):
        Engine.open(package.path, anchors, device="cuda", learn=False)


def test_an_unknown_device(package: EnginePackage, anchors: Path) -> None:
    with pytest.raises(UsageError, match=r"tpu.*cpu, cuda"):
        Engine.open(package.path, anchors, device="tpu", learn=False)


@pytest.mark.parametrize("threads", [0, -1])
def test_threads_must_be_positive(package: EnginePackage, anchors: Path, threads: int) -> None:
    with pytest.raises(UsageError, match="threads"):
        Engine.open(package.path, anchors, threads=threads, learn=False)


def test_more_threads_than_cores_are_as_many_as_there_are_cores(
    package: EnginePackage, caplog: pytest.LogCaptureFixture
) -> None:
    assert usable_threads(10_000) == usable_cores()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    caplog.clear()
    assert usable_threads(usable_cores()) == usable_threads(None) == usable_cores()
    assert usable_threads(1) == 1
    assert not caplog.records
    open_runtime(package, threads=10_000)
    (record,) = caplog.records
    assert "10000" in record.message


@pytest.fixture(scope="module")
def shipped() -> EnginePackage:
    """The default package, whose decoder the kernels know."""
    return EnginePackage.open(embedded_assets() / "package")


class Stopwatch:
    """A clock that calls advance, each by what it is said to take."""

    def __init__(self) -> None:
        self.now, self.calls = 0.0, 0

    def __call__(self) -> float:
        return self.now

    def taking(self, seconds: float) -> Callable[[], None]:
        def call() -> None:
            self.now += seconds
            self.calls += 1

        return call


@pytest.mark.parametrize(
    ("seconds", "found"),
    [
        ({"1": 0.08, "2": 0.04, "4": 0.02, "6": 0.03}, "4"),  # two slow cores hold up the others
        ({"1": 0.08, "2": 0.04, "4": 0.02, "6": 0.015}, "6"),
        ({"1": 0.0201, "2": 0.02, "4": 0.02, "6": 0.02}, "1"),  # they share what they need
        ({"kernel": 0.02, "graph": 0.01}, "graph"),
    ],
)
def test_the_fastest_is_found_by_measurement(seconds: dict[str, float], found: str) -> None:
    watch = Stopwatch()
    calls = {way: watch.taking(took) for way, took in seconds.items()}
    assert fastest(calls, clock=watch) == found
    assert watch.calls == 6 * len(calls)


def test_what_takes_long_is_measured_twice_behind_a_call_that_does_not_count() -> None:
    watch = Stopwatch()
    calls = {"kernel": watch.taking(3.0), "graph": watch.taking(4.0)}
    assert fastest(calls, clock=watch) == "kernel"
    assert watch.calls == 6


class Measuring:
    """Stands for the measurement, with what it is to find, and counts."""

    def __init__(self, found: Way) -> None:
        self.found, self.asked = found, list[list[Way]]()

    def __call__(self, calls: Mapping[Way, Callable[[], object]]) -> Way:
        self.asked.append([*calls])
        for call in calls.values():
            call()
        return self.found


def test_where_cores_differ_the_choice_is_measured_once(
    shipped: EnginePackage,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    measuring = Measuring(Way(native=True, threads=1))
    monkeypatch.setenv("MEIQA_CACHE", str(tmp_path))
    monkeypatch.setattr(runtime, "cores_differ", lambda: True)
    monkeypatch.setattr(runtime, "fastest", measuring)
    for _ in range(2):
        decoder = open_runtime(shipped).decoder
        assert isinstance(decoder, NativeDecoder)
        assert decoder.threads == 1
    ((*_, last),) = measuring.asked
    assert last == Way(native=True, threads=usable_cores())
    (kept,) = (tmp_path / "costs").iterdir()
    kept.write_text("many")
    open_runtime(shipped)
    assert len(measuring.asked) == 2
    assert "measured again" in caplog.text


@pytest.mark.parametrize("native", [True, False])
def test_a_large_decoder_runs_as_it_was_measured_to_be_faster(
    shipped: EnginePackage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, native: bool
) -> None:
    measuring = Measuring(Way(native=native, threads=None))
    opened: list[str] = []

    def noting(package: EnginePackage, names: Sequence[str], *how: Any) -> Sequence[GraphSession]:
        opened.extend(names)
        return open_graphs(package, names, *how)

    monkeypatch.setenv("MEIQA_CACHE", str(tmp_path))
    monkeypatch.setattr(runtime, "cores_differ", lambda: False)
    monkeypatch.setattr(runtime, "LARGEST_CACHED_BYTES", 0)
    monkeypatch.setattr(runtime, "fastest", measuring)
    open_runtime(shipped)
    monkeypatch.setattr(runtime, "open_graphs", noting)
    decoder = open_runtime(shipped).decoder
    assert measuring.asked == [[Way(native=True, threads=None), Way(native=False, threads=None)]]
    assert isinstance(decoder, NativeDecoder if native else GraphDecoder)
    assert opened == (["vision"] if native else ["vision", "decoder"])
    by_one = open_runtime(shipped, threads=1).decoder  # whose answers are the same
    assert type(by_one) is type(decoder)
    assert len(measuring.asked) == 1


def test_without_memory_to_measure_the_kernel_runs_a_large_decoder(
    shipped: EnginePackage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(runtime, "LARGEST_CACHED_BYTES", 0)
    monkeypatch.setattr(runtime, "usable_memory", lambda: 1 << 20)
    with caplog.at_level(logging.INFO):
        assert isinstance(open_runtime(shipped).decoder, NativeDecoder)
    assert "no memory to measure" in caplog.text


def test_a_large_decoder_is_not_held_in_floats(
    shipped: EnginePackage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "LARGEST_CACHED_BYTES", 0)
    monkeypatch.setattr(runtime, "FASTEST", "portable")
    assert isinstance(open_runtime(shipped).decoder, GraphDecoder)


@pytest.mark.skipif(not KERNELS[FASTEST_IN_BF16].in_bf16, reason="no kernel here has bf16")
def test_a_decoder_is_multiplied_in_bf16_where_its_package_allows_it(
    shipped: EnginePackage,
) -> None:
    manifests = [replace(shipped.manifest, bf16=allowed) for allowed in (False, True)]
    packages = [EnginePackage(shipped.path, manifest) for manifest in manifests]
    made = [np.array(comparisons(open_runtime(each).decoder, each, 4)()) for each in packages]
    layers = layers_beside(shipped.path / "decoder.onnx.data")
    exact = comparisons(NativeDecoder(*layers, 1), shipped, 4)()
    np.testing.assert_array_equal(made[0], exact)
    assert 0 < relative_difference(made[0], made[1]) < 0.05


@pytest.mark.parametrize("threads", [0, -1])
def test_fewer_threads_than_one_are_refused(package: EnginePackage, threads: int) -> None:
    with pytest.raises(UsageError, match="threads"):
        usable_threads(threads)
    with pytest.raises(UsageError, match="threads"):
        open_runtime(package, threads=threads)


@pytest.mark.parametrize("name", ["vision.onnx", "decoder.onnx"])
@pytest.mark.parametrize("content", [b"", b"not a graph", b"\x08\x08"], ids=repr)
def test_a_file_that_is_no_graph(
    package: EnginePackage, tmp_path: Path, name: str, content: bytes
) -> None:
    folder = Path(shutil.copytree(package.path, tmp_path / "copy"))
    (folder / name).write_bytes(content)
    with pytest.raises(PackageCorrupted) as caught:
        open_runtime(EnginePackage.open(folder, verify=False), threads=1)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("graph", ["vision", "decoder"])
@pytest.mark.parametrize("kind", ["inputs", "outputs"])
def test_a_graph_of_another_interface(package: EnginePackage, graph: str, kind: str) -> None:
    manifest = package.manifest
    other = {
        **manifest.graphs,
        graph: replace(manifest.graphs[graph], **{kind: {"something": (1, "n")}}),
    }
    changed = EnginePackage(package.path, replace(manifest, graphs=other))
    with pytest.raises(PackageCorrupted, match=rf"{graph}\.onnx has other {kind}.*something"):
        open_runtime(changed, threads=1)


def test_a_truncated_graph(package: EnginePackage, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(package.path, tmp_path / "copy"))
    whole = (folder / "decoder.onnx").read_bytes()
    (folder / "decoder.onnx").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(PackageCorrupted, match=r"decoder\.onnx"):
        open_runtime(EnginePackage.open(folder, verify=False), threads=1)


@pytest.mark.parametrize("name", ["vision", "decoder"])
def test_truncated_weights(package: EnginePackage, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(package.path, tmp_path / "copy"))
    weights = folder / f"{name}.onnx.data"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(PackageCorrupted, match=rf"{name}\.onnx"):
        open_runtime(EnginePackage.open(folder, verify=False), threads=1)


def test_a_memory_of_another_package(int8_package: EnginePackage, anchors: Path) -> None:
    with pytest.raises(StoreMismatch):
        Engine.open(int8_package.path, anchors, learn=False)


def test_a_refused_engine_leaves_the_memory_unlocked(
    package: EnginePackage, anchors: Path, tmp_path: Path
) -> None:
    memory = Path(shutil.copytree(anchors, tmp_path / "memory"))
    with pytest.raises(UsageError) as caught:
        Engine.open(package.path, memory, device="tpu")
    with Engine.open(package.path, memory, threads=1) as engine:
        assert engine.memory.forget() == 0
    assert "tpu" in str(caught.value)
