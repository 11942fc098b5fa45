"""A tiny random model, exported once a session, with a memory; fixtures import PyTorch late."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.engine.samples import SIZES, build_anchors, picture

if TYPE_CHECKING:
    from meiqa.engine.package import EnginePackage


@pytest.fixture(scope="session", autouse=True)
def caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what can be computed again apart from the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEIQA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the folder of a random model's checkpoint."""
    from tests.export import tiny

    return tiny.save(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="session")
def package(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> EnginePackage:
    """Give the random model's fp32 package; tests that change files copy it."""
    from tests.export import tiny

    pictures = [picture(seed, size) for seed, size in enumerate(SIZES)]
    return tiny.export_float(checkpoint, tmp_path_factory.mktemp("fp32") / "package", pictures)


@pytest.fixture(scope="session")
def int8_package(
    checkpoint: Path, package: EnginePackage, tmp_path_factory: pytest.TempPathFactory
) -> EnginePackage:
    """Give the random model's INT8 package."""
    from tests.export import tiny

    pictures = [picture(seed, size) for seed, size in enumerate(SIZES)]
    out = tmp_path_factory.mktemp("int8") / "package"
    return tiny.export_from(package, checkpoint, out, "int8", pictures)


@pytest.fixture(scope="session")
def anchors(package: EnginePackage, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a memory of 24 anchors made by the fp32 package, to be copied before writing."""
    return build_anchors(tmp_path_factory.mktemp("memory") / "anchors", package)
