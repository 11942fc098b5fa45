"""Alone, in a batch, in reverse, with one and two threads, warm and cold: one score."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from meiqa.engine.engine import Engine
from meiqa.engine.package import EnginePackage
from tests.engine.samples import PHOTOS, K, Picture, assessed, build_anchors


@pytest.fixture(scope="module", params=["fp32", "int8"])
def opened(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[EnginePackage, Path]:
    if request.param == "fp32":
        return request.getfixturevalue("package"), request.getfixturevalue("anchors")
    package: EnginePackage = request.getfixturevalue("int8_package")
    return package, build_anchors(tmp_path_factory.mktemp("int8") / "anchors", package)


@pytest.mark.slow
def test_however_it_is_asked(opened: tuple[EnginePackage, Path]) -> None:
    package, anchors = opened

    def batch(photos: Sequence[Picture], threads: int) -> list[list[float]]:
        with Engine.open(package.path, anchors, threads=threads, learn=False) as engine:
            runs = [assessed(engine.score_many(photos, k=K)) for _ in range(2)]
        return [[result.score for result in run] for run in runs]

    cold, warm = batch(PHOTOS, 1)
    assert np.ptp(cold) > 0.1
    backwards = batch(PHOTOS[::-1], 1)[0][::-1]
    two_threads = batch(PHOTOS, 2)[0]
    alone = [batch([photo], 1)[0][0] for photo in PHOTOS]
    for scores in (warm, backwards, two_threads, alone):
        np.testing.assert_allclose(scores, cold, atol=1e-3, rtol=0)
