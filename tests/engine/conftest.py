"""Engines over the tiny random model and its memory."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from meiqa.engine.package import EnginePackage
from meiqa.engine.pipeline import Engine
from tests.engine.samples import K, calibrated_copy


@pytest.fixture(scope="session")
def engine(package: EnginePackage, anchors: Path) -> Iterator[Engine]:
    """Give an engine that cannot learn."""
    with Engine.open(package.path, anchors, threads=1, learn=False) as engine:
        yield engine


@pytest.fixture
def memory(anchors: Path, tmp_path: Path) -> Path:
    """Give a memory that may be written."""
    return Path(shutil.copytree(anchors, tmp_path / "memory"))


@pytest.fixture
def keen(package: EnginePackage, tmp_path: Path) -> Path:
    """Give a package that reflects on whatever moves at all."""
    return calibrated_copy(package, tmp_path / "keen", reflect_above=0.0, neighbours=K).path
