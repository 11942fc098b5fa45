"""A checkpoint and its packages as they are written now; other tests take the committed ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from meiqa.engine.package import EnginePackage
from tests.engine.samples import SIZES, picture
from tests.export.tiny import export_float, export_from, make_checkpoint
from training.checkpoint import save_checkpoint

PICTURES = [picture(seed, size) for seed, size in enumerate(SIZES)]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Keep PyTorch from waking threads for matrices so small that they only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the folder of a random model's checkpoint."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    save_checkpoint(make_checkpoint(), folder)
    return folder


@pytest.fixture(scope="session")
def package(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> EnginePackage:
    """Give the random model's fp32 package; tests that change files copy it."""
    return export_float(checkpoint, tmp_path_factory.mktemp("fp32") / "package", PICTURES)


@pytest.fixture(scope="session")
def int8_package(
    checkpoint: Path, package: EnginePackage, tmp_path_factory: pytest.TempPathFactory
) -> EnginePackage:
    """Give the random model's INT8 package."""
    out = tmp_path_factory.mktemp("int8") / "package"
    return export_from(package, checkpoint, out, "int8", PICTURES)
