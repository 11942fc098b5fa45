"""A tiny random model with a memory, as tests/export/make_tiny.py wrote it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.hub_server import Server, serving
from meiqa.engine.package import EnginePackage

TINY = Path(__file__).parent / "data" / "tiny"


@pytest.fixture(scope="session", autouse=True)
def caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what can be computed again apart from the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEIQA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a copy of the committed files, in which `patterned` is a whole package."""
    copy = tmp_path_factory.mktemp("committed") / "tiny"
    shutil.copytree(TINY / "fp32", copy / "patterned")
    return Path(shutil.copytree(TINY, copy, dirs_exist_ok=True))


@pytest.fixture(scope="session")
def checkpoint(tiny_files: Path) -> Path:
    """Give the folder of a random model's checkpoint."""
    return tiny_files / "checkpoint"


@pytest.fixture(scope="session")
def package(tiny_files: Path) -> EnginePackage:
    """Give the random model's fp32 package; tests that change files copy it."""
    return EnginePackage.open(tiny_files / "fp32")


@pytest.fixture(scope="session")
def int8_package(tiny_files: Path) -> EnginePackage:
    """Give the random model's INT8 package."""
    return EnginePackage.open(tiny_files / "int8")


@pytest.fixture(scope="session")
def patterned(tiny_files: Path) -> EnginePackage:
    """Give the fp32 package with distortion patterns of random weights."""
    return EnginePackage.open(tiny_files / "patterned")


@pytest.fixture(scope="session")
def anchors(tiny_files: Path) -> Path:
    """Give a memory of 24 anchors made by the fp32 package, to be copied before writing."""
    return tiny_files / "anchors"


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """Give a PostgreSQL server: one of our own, or the one that MEIQA_TEST_POSTGRES names."""
    with serving() as server:
        yield server


@pytest.fixture(scope="session")
def a_hub(server: Server) -> str:
    """Give the address of a hub that each test has to itself in turn."""
    return server.hub()


@pytest.fixture
def hub(server: Server, a_hub: str) -> str:
    """Give the address of an empty hub, for its owner."""
    return server.anew(a_hub)
