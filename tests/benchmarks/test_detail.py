"""The ladders are what they say, and steps are counted by judge."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks.detail import LADDERS, Tally, climb, motion_blurred, noisy, text_of
from meiqa.testing import FakeEngine, mean_brightness

BLOCKS = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)
PICTURE = BLOCKS.repeat(8, 0).repeat(8, 1)


def test_motion_keeps_the_tone_and_follows_one_line() -> None:
    point = np.zeros((41, 41, 3), np.uint8)
    point[20, 20] = 255
    line = motion_blurred(point, 12, np.random.default_rng(3))[..., 0]
    rows, columns = np.nonzero(line)
    spread = np.linalg.svd(np.cov(rows, columns), compute_uv=False)
    assert spread[1] < 0.1 * spread[0]
    assert np.hypot(np.ptp(rows), np.ptp(columns)) == pytest.approx(12, abs=2)


def test_noise_has_its_deviation() -> None:
    grey = np.full((100, 100, 3), 128, np.uint8)
    assert noisy(grey, 12, np.random.default_rng(0)).std() == pytest.approx(12, rel=0.05)


def test_steps_are_counted_for_both_judges() -> None:
    tally = Tally()
    climb(FakeEngine(lambda pixels: mean_brightness(pixels.array)), PICTURE, 0, tally)
    report = tally.report()
    steps = {name: len(strengths) * times for name, (_, strengths, times) in LADDERS.items()}
    assert report["steps"] == steps
    assert report["in order"]["detail"]["sharpness"] == 1.0
    assert set(report["medians"]["motion 24"]) == {"sharpness", "motion", "noise", "score"}
    assert "medians" not in text_of({"large": json.loads(json.dumps(report))})
