"""Where the model fails is shown by the case that rises most of each type."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
from PIL import Image

from benchmarks.failures import draw, worst_of_each_type
from meiqa.engine.engine import Engine
from tests.engine.samples import picture


class Brightness:
    """Scores an image by its mean: brightening raises it, darkening lowers it."""

    def score(self, image: np.ndarray, learn: bool) -> SimpleNamespace:
        assert not learn
        return SimpleNamespace(score=float(1.0 + 4.0 * image.mean() / 255.0))


def test_the_worst_case_of_each_type_is_found_and_drawn(tmp_path: Path) -> None:
    photographs = []
    for seed in range(2):
        photographs.append(tmp_path / f"{seed}.png")
        Image.fromarray(picture(seed, (64, 80))).save(photographs[-1])
    shown = []
    cases = worst_of_each_type(cast(Engine, Brightness()), photographs, lambda: shown.append(1))
    assert len(shown) == 2
    assert len(cases) == 25
    assert [case.rise for case in cases] == sorted((case.rise for case in cases), reverse=True)
    rises = {case.kind: case.rise for case in cases}
    assert rises["brightening"] > 0.3
    assert rises["darkening"] < 0.0
    assert cases[0].kind == max(rises, key=lambda kind: rises[kind])
    for case in cases:
        assert case.rise == case.score_after - case.score_before
    draw(cases[:2], tmp_path / "failures.png")
    with Image.open(tmp_path / "failures.png") as drawn:
        assert drawn.height > drawn.width / 2
