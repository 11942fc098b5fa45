"""The engine without a model that ships, behind the command line: it judges brightness."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from meiqa.cli import options
from meiqa.engine.images import Pixels
from meiqa.testing import FakeEngine


def brightness(pixels: Pixels) -> float:
    """1 for black to 5 for white."""
    return 1 + 4 * float(pixels.array.mean()) / 255


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    """Put an engine without a model behind the command line."""
    engine = FakeEngine(brightness)
    monkeypatch.setattr(options, "engine_of", lambda *_, **__: engine)
    return engine


@pytest.fixture
def grey(tmp_path: Path) -> Callable[..., Path]:
    """Write a grey picture below the test's directory and give its path."""

    def write(name: str, level: int = 128) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((6, 8, 3), level, np.uint8)).save(path)
        return path

    return write
