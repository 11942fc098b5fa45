"""What comparing two shots of one scene is worth, fitted on anchors that are damaged a little.

Of each anchor two shots are made as a hand makes them, one of them damaged or damaged more, by
what cameras do. Nobody has to be asked which is better, and how much does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from scipy.optimize import minimize
from scipy.special import ndtri

from meiqa.engine.calibration import SceneVerdict
from meiqa.engine.images import SMALLEST_SIDE, load_pixels
from meiqa.engine.model import Model
from meiqa.engine.sets import Candidate
from meiqa.evaluation.recording import AskedOnce, Recorder
from meiqa.memory import MemoryBank, RetrievalPolicy

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float64]
Damage = Callable[[Bytes, np.random.Generator], Bytes]

SCENES = 120
"""Anchors that are shot twice, at the most."""
HAND, EXPOSURE = 0.03, 0.1
"""By how much of its side the view moves, and by how many EV the light differs, at the most."""
RIDGE, LEAST_WEIGHT = 0.01, 1e-3
"""Of the weights of verdict and gap, in units of their size; evidence that errs gets the least."""
CERTAIN, SMALLEST_SIGMA = 1e-4, 0.02
"""Preferences are not taken for surer than this when sigma is fitted, and it is no smaller."""


def blurred(radius: float) -> Damage:
    """Out of focus."""
    return lambda pixels, _: np.asarray(
        Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(radius))
    )


def noisy(deviation: float) -> Damage:
    """Too little light for the sensor."""
    return lambda pixels, rng: in_bytes(pixels + rng.normal(0.0, deviation, pixels.shape))


def compressed(quality: int) -> Damage:
    """Stored too small."""

    def made(pixels: Bytes, _: np.random.Generator) -> Bytes:
        file = BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=quality)
        return np.asarray(Image.open(file).convert("RGB"))

    return made


def lit(factor: float) -> Damage:
    """Exposed wrongly: linear light, so that highlights clip."""
    return lambda pixels, _: in_bytes(255 * ((pixels / 255) ** 2.2 * factor) ** (1 / 2.2))


def faded(contrast: float) -> Damage:
    """Veiled: less contrast around the mean."""
    return lambda pixels, _: in_bytes(pixels.mean() + contrast * (pixels - pixels.mean()))


DAMAGES: tuple[tuple[Damage, Damage], ...] = (
    (blurred(0.7), blurred(1.2)),
    (blurred(1.5), blurred(2.5)),
    (noisy(4), noisy(8)),
    (noisy(12), noisy(20)),
    (compressed(60), compressed(35)),
    (compressed(30), compressed(15)),
    (lit(0.5), lit(0.25)),
    (lit(2.0), lit(4.0)),
    (faded(0.7), faded(0.5)),
)
"""Little and more of each."""


def in_bytes(values: NDArray[np.floating]) -> Bytes:
    """Round to what a photo holds."""
    rounded: Bytes = np.rint(np.clip(values, 0, 255)).astype(np.uint8)
    return rounded


def two_shots(pixels: Bytes, number: int) -> tuple[Bytes, Bytes]:
    """Make two shots of a photo (H, W, 3), the sound one first."""
    rng = np.random.default_rng(number)
    little, more = DAMAGES[number % len(DAMAGES)]
    # A photo that is as small as may be judged is not moved.
    size = np.maximum((np.array(pixels.shape[:2]) * (1.0 - HAND)).astype(int), SMALLEST_SIDE)
    shots = []
    for light in (1.0, 2.0 ** rng.uniform(-EXPOSURE, EXPOSURE)):
        top, left = rng.integers(0, np.array(pixels.shape[:2]) - size + 1)
        shots.append(in_bytes(light * pixels[top : top + size[0], left : left + size[1]]))
    sound = shots[0] if number // len(DAMAGES) % 2 else little(shots[0], rng)
    worse = little if sound is shots[0] else more
    return sound, worse(shots[1], rng)


def fitted_scene(
    model: Model,
    bank: MemoryBank,
    files: Sequence[str],
    images: Path,
    on_progress: Callable[[], None] = lambda: None,
) -> tuple[SceneVerdict, dict[str, float]]:
    """Compare two shots of each of some anchors, and fit what that is worth.

    Returns:
        The fit, and how often the sound shot is found: by scores alone, by the verdict alone and
        by both.
    """
    recorder = Recorder(AskedOnce(model), bank)
    logits, gaps = [], []
    for number, file in enumerate(files[:SCENES]):
        pixels = load_pixels(images / file).array
        sound, worse = (
            Candidate.of(recorder.recorded(load_pixels(shot), RetrievalPolicy(k=0)))
            for shot in two_shots(pixels, number)
        )
        logits.append(recorder.comparer.between(sound, [worse])[0])
        gaps.append(sound.prior - worse.prior)
        on_progress()
    verdict = fitted_verdict(np.array(logits), np.array(gaps))
    said = np.array(logits).mean(axis=1)
    both = verdict.preferences(np.array(logits), np.array(gaps))
    return verdict, {
        "pairs": len(gaps),
        "by_scores": float(np.mean(np.array(gaps) > 0.0)),
        "by_verdict": float(np.mean(said > 0.0)),
        "by_both": float(np.mean(both > 0.5)),
    }


def fitted_verdict(logits: Floats, gaps: Floats) -> SceneVerdict:
    """Fit verdicts (N, 2) and gaps (N,) of pairs of which the first is the better.

    Temperature and gap are the likeliest with a ridge, without which pairs that are all told right
    would be told ever surer. Sigma is the scale on which a preference stands for the gap that goes
    with it.
    """
    evidence = np.stack([logits.mean(axis=1), gaps], axis=1)
    sizes = np.sqrt(np.mean(evidence**2, axis=0)) + 1e-9
    units = evidence / sizes

    def surprise(weights: Floats) -> float:
        return float(np.logaddexp(0.0, -units @ weights).mean() + RIDGE * np.sum(weights**2))

    found = minimize(surprise, np.ones(2), bounds=[(LEAST_WEIGHT, None)] * 2)
    temperature, gap = sizes / found.x
    verdict = SceneVerdict(float(temperature), float(gap), 1.0)
    deviates = ndtri(np.clip(verdict.preferences(logits, gaps), CERTAIN, 1.0 - CERTAIN))
    sigma = float(np.sum(deviates * gaps) / np.sum(deviates**2))
    return replace(verdict, sigma=max(SMALLEST_SIGMA, sigma))
