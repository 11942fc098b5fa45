"""Optimised graphs are kept from one process to the next, and nothing hangs on it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

from meiqa.engine.manifest import GRAPHS
from meiqa.engine.package import EnginePackage
from meiqa.engine.runtime import onnx
from meiqa.engine.runtime.decoder import GraphSession
from meiqa.engine.runtime.onnx import (
    MOST_KEPT,
    KeptGraph,
    OnnxSession,
    kept_graph,
    kept_graphs,
    open_onnx,
)
from meiqa.errors import PackageCorrupted


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MEIQA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "graphs"


@pytest.fixture
def created(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each session that is made, whether its graph was optimised then."""
    made: list[bool] = []
    create = onnxruntime.InferenceSession

    def recording(source: object, *args: object, **options: object) -> object:
        made.append(Path(str(source)).suffix != ".graph")
        return create(source, *args, **options)

    monkeypatch.setattr(onnx.onnxruntime, "InferenceSession", recording)
    return made


def answered(session: GraphSession, package: EnginePackage) -> NDArray[np.float32]:
    from meiqa.export.verify import vision_feeds

    return session.run(next(vision_feeds(package.manifest.image)))["tokens"]


def vision_session(package: EnginePackage) -> OnnxSession:
    graph = package.manifest.graphs["vision"]
    return OnnxSession(package.path, graph, "cpu", 1, kept_graph(package, "vision"))


def test_the_second_opening_takes_what_the_first_kept(
    int8_package: EnginePackage, cache: Path, created: list[bool]
) -> None:
    first = open_onnx(int8_package, GRAPHS, "cpu", 2)
    assert created == [True, True]
    assert len(list(cache.glob("*.graph"))) == len(list(cache.iterdir())) == 2
    second = open_onnx(int8_package, GRAPHS, "cpu", 2)
    assert created[2:] == [False, False]
    wanted = answered(first[0], int8_package)
    np.testing.assert_array_equal(answered(second[0], int8_package), wanted)


@pytest.mark.parametrize("damage", ["cut", "changed", "empty", "none of ONNX Runtime's"])
def test_what_is_damaged_is_optimised_anew(
    package: EnginePackage, cache: Path, created: list[bool], damage: str
) -> None:
    wanted = answered(vision_session(package), package)
    (kept,) = cache.iterdir()
    sound = kept.read_bytes()
    if damage == "none of ONNX Runtime's":
        place = kept_graph(package, "vision")
        assert place is not None
        with place.written() as unfinished:
            unfinished.write_bytes(b"a graph of another program")
    else:
        changed = sound[:-9] + bytes([sound[-9] ^ 1]) + sound[-8:]
        kept.write_bytes({"cut": sound[:-100], "changed": changed, "empty": b""}[damage])
    found = answered(vision_session(package), package)
    np.testing.assert_array_equal(found, wanted)
    assert created[-1]
    vision_session(package)
    assert not created[-1]


@pytest.mark.parametrize("changed", ["version", "processor", "package"])
def test_another_machine_or_package_has_its_own(
    package: EnginePackage,
    int8_package: EnginePackage,
    monkeypatch: pytest.MonkeyPatch,
    changed: str,
) -> None:
    before = kept_graph(package, "vision")
    assert before == kept_graph(package, "vision")
    if changed == "version":
        monkeypatch.setattr(onnxruntime, "__version__", "0.0")
    elif changed == "processor":
        monkeypatch.setattr(onnx, "processor", lambda: "another")
    after = kept_graph(int8_package if changed == "package" else package, "vision")
    assert before is not None
    assert after is not None
    assert before.path != after.path
    assert before.path != (kept_graph(package, "decoder") or before).path


@pytest.mark.parametrize("name", ["vision", "decoder"])
def test_what_is_kept_answers_as_a_graph_that_is_not(
    int8_package: EnginePackage, created: list[bool], name: str
) -> None:
    from meiqa.export.verify import decoder_feeds, vision_feeds

    manifest = int8_package.manifest
    graph = manifest.graphs[name]
    feeds = decoder_feeds(manifest.decoder) if name == "decoder" else vision_feeds(manifest.image)
    kept = kept_graph(int8_package, name)
    plain, _, from_kept = (
        OnnxSession(int8_package.path, graph, "cpu", 1, place) for place in (None, kept, kept)
    )
    assert created == [True, True, False]
    for each in feeds:
        wanted, found = plain.run(each), from_kept.run(each)
        for output, values in wanted.items():
            np.testing.assert_array_equal(found[output], values)


def test_two_writers_have_a_file_each(package: EnginePackage, cache: Path) -> None:
    place = kept_graph(package, "vision")
    assert place is not None
    with place.written() as one, place.written() as other:
        assert one != other
        one.write_bytes(b"one")
        other.write_bytes(b"other")
    assert [file.read_bytes()[:3] for file in cache.iterdir()] == [b"one"]


def test_where_the_processor_is_not_known_nothing_is_kept(
    package: EnginePackage, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx, "processor", lambda: None)
    assert answered(vision_session(package), package).size
    assert not cache.exists()


def test_where_nothing_can_be_written_nothing_is_kept(
    package: EnginePackage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MEIQA_CACHE", str(tmp_path / "file"))
    assert answered(vision_session(package), package).size


def test_where_there_is_no_home_nothing_is_kept(
    package: EnginePackage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("MEIQA_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert answered(vision_session(package), package).size


def test_a_full_disk_leaves_nothing(
    package: EnginePackage, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(unfinished: Path, path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(onnx.os, "replace", full)
    assert answered(vision_session(package), package).size
    assert list(cache.iterdir()) == []


def test_those_not_used_for_longest_are_removed(cache: Path) -> None:
    for number in range(MOST_KEPT + 3):
        kept = KeptGraph((str(number),))
        with kept.written() as unfinished:
            unfinished.write_bytes(b"graph")
        os.utime(kept.path, (number, number))
        assert KeptGraph(("0",)).is_sound()
    assert not KeptGraph(("1",)).is_sound()
    assert KeptGraph((str(MOST_KEPT + 2),)).is_sound()
    assert len(list(kept_graphs().iterdir())) == MOST_KEPT


def test_large_graphs_are_not_kept(
    package: EnginePackage, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    monkeypatch.setattr(onnx, "LARGEST_BYTES", 1000)
    assert kept_graph(package, "vision") is None
    vision_session(package)
    assert not cache.exists()


def test_a_graph_that_cannot_be_loaded_is_still_the_packages_fault(
    package: EnginePackage, tmp_path: Path, cache: Path
) -> None:
    shutil.copytree(package.path, tmp_path / "package")
    (tmp_path / "package" / "vision.onnx").write_bytes(b"no graph")
    damaged = EnginePackage.open(tmp_path / "package", verify=False)
    with pytest.raises(PackageCorrupted, match="can't load"):
        vision_session(damaged)
    assert list(cache.iterdir()) == []
