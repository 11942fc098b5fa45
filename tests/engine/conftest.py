"""Engines over the tiny random model and its memory."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from meiqa.engine.engine import Engine
from meiqa.engine.package import EnginePackage
from tests.engine.samples import K, calibrated_copy, fake_anchors


@pytest.fixture(scope="session")
def engine(package: EnginePackage, anchors: Path) -> Iterator[Engine]:
    """Give an engine that cannot learn."""
    with Engine.open(package.path, anchors, threads=1, learn=False) as engine:
        yield engine


@pytest.fixture(scope="session")
def remembered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a memory of 24 anchors made by a `FakeModel`."""
    return fake_anchors(tmp_path_factory.mktemp("fake") / "anchors")


@pytest.fixture
def memory(anchors: Path, tmp_path: Path) -> Path:
    """Give a memory that may be written."""
    return Path(shutil.copytree(anchors, tmp_path / "memory"))


@pytest.fixture
def keen(package: EnginePackage, tmp_path: Path) -> Path:
    """Give a package that reflects on whatever moves at all."""
    return calibrated_copy(package, tmp_path / "keen", reflect_above=0.0, neighbours=K).path
