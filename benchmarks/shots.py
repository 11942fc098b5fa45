"""Finding near-identical shots, and the best of them: where likeness begins, and who is chosen.

`python -m benchmarks.shots --images DIR` makes a burst of each of some photographs: five
shots from a hand that moves, tilts and steps back a little, of which one is as good as the
photograph and the others are blurred, shaken, noisy or compressed. Bursts of a real camera also
differ by what moves before it, which this has not. Reported are the likenesses within a burst and
between strangers, of views, of the thumbnails behind them and of layouts of visual tokens; what
each threshold puts together; and how often the best shot is the one that was left as it was, by
comparing the shots with each other and by their scores alone.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from meiqa.engine.engine import Engine
from meiqa.engine.files import IMAGE_SUFFIXES
from meiqa.engine.images import fit_to_grid, load_pixels
from meiqa.engine.local import LocalModel
from meiqa.engine.package import EnginePackage
from meiqa.engine.shots import SIDE, grouped, likenesses, view_of
from meiqa.evaluation.measuring import run_on
from meiqa.locations import embedded_assets
from meiqa.memory import spatial_descriptor
from meiqa.progress import Progress

__all__ = ["bench_shots", "main"]

Floats = NDArray[np.float32]

SHOTS = 5
HAND = 0.03
"""By how much of its side the view moves, at the most; it tilts by up to a degree."""
THRESHOLDS = (0.3, 0.4, 0.45, 0.5, 0.55, 0.6, 0.7)


def bench_shots(
    photos: Sequence[Path], judged: int, seed: int = 0, package: Path | None = None
) -> dict[str, Any]:
    """Make bursts, group their shots at each threshold, and choose the best of some.

    Args:
        photos: photographs, one burst each.
        judged: how many of the bursts are judged by the engine; layouts are made of all.
        seed: of what the hand does.
    """
    bursts = [burst(Image.open(photo).convert("RGB"), seed + n) for n, photo in enumerate(photos)]
    shots = [shot for each in bursts for shot in each]
    truth = np.repeat(np.arange(len(bursts)), SHOTS)
    views = [view_of(np.asarray(shot)) for shot in shots]
    thumbnails = [thumbnail_of(np.asarray(shot)) for shot in shots]
    layouts = np.stack(layouts_of(shots, package))
    return {
        "bursts": len(bursts),
        "shots_each": SHOTS,
        "hand": HAND,
        "views": by_kind(likenesses(views, views), truth),
        "thumbnails": by_kind(likenesses(thumbnails, thumbnails), truth),
        "layouts": by_kind(layouts @ layouts.T, truth),
        "thresholds": [found_at(views, truth, alike) for alike in THRESHOLDS],
        "choice": chosen(bursts[:judged], package),
        **run_on(),
    }


def burst(photo: Image.Image, seed: int) -> list[Image.Image]:
    """The photograph as it comes from a moving hand, and four worse shots of it."""
    rng = random.Random(seed)
    spoil: list[Callable[[Image.Image], Image.Image]] = [
        lambda shot: shot,
        lambda shot: shot.filter(ImageFilter.GaussianBlur(rng.uniform(0.8, 2.5))),
        lambda shot: shaken(shot, rng.randint(4, 12)),
        lambda shot: noisy(shot, rng.uniform(8, 25), seed),
        lambda shot: compressed(shot, rng.randint(8, 30)),
    ]
    return [each(handheld(photo, rng)) for each in spoil]


def handheld(photo: Image.Image, rng: random.Random) -> Image.Image:
    """Another view of the same thing: moved, tilted and a little closer or farther."""
    width, height = photo.size
    turned = photo.rotate(rng.uniform(-1.0, 1.0), Image.Resampling.BICUBIC)
    margin = HAND + rng.uniform(0.0, HAND)
    left, top = (margin + rng.uniform(-HAND, HAND) for _ in range(2))
    size = 1.0 - 2.0 * margin
    box = (left * width, top * height, (left + size) * width, (top + size) * height)
    return turned.resize(photo.size, Image.Resampling.BICUBIC, box=box)


def shaken(photo: Image.Image, pixels: int) -> Image.Image:
    """The camera moved to the side while the shutter was open."""
    array = np.asarray(photo, np.float32)
    moved = [np.roll(array, step - pixels // 2, axis=1) for step in range(pixels)]
    return Image.fromarray(np.mean(moved, axis=0).round().astype(np.uint8))


def noisy(photo: Image.Image, deviation: float, seed: int) -> Image.Image:
    """Too little light."""
    noise = np.random.default_rng(seed).normal(0.0, deviation, (photo.height, photo.width, 3))
    return Image.fromarray((np.asarray(photo) + noise).clip(0, 255).astype(np.uint8))


def compressed(photo: Image.Image, quality: int) -> Image.Image:
    """Stored too small."""
    file = BytesIO()
    photo.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def layouts_of(shots: Sequence[Image.Image], path: Path | None) -> list[Floats]:
    """Layouts of the shots' visual tokens, for comparison."""
    package = EnginePackage.open(path or embedded_assets() / "package")
    model = LocalModel.open(package)
    made = []
    with Progress(len(shots)) as progress:
        for shot in shots:
            tokens = model.encode(fit_to_grid(load_pixels(shot), model.image))
            made.append(spatial_descriptor(tokens.values, tokens.grid))
            progress.advance()
    return made


def thumbnail_of(pixels: NDArray[np.uint8]) -> Floats:
    """A view from which the surroundings were not taken off, but its mean colour."""
    small = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BOX, reducing_gap=3.0)
    thumbnail: Floats = np.asarray(small, np.float32)
    thumbnail = thumbnail - thumbnail.mean((0, 1))
    return thumbnail


def by_kind(likeness: Floats, truth: NDArray[np.intp]) -> dict[str, Any]:
    """Likenesses (N, N) of pairs within a burst, and of pairs of strangers."""
    one, other = np.triu_indices(len(truth), 1)
    found, same = likeness[one, other], truth[one] == truth[other]
    return {
        "within": quantiles(found[same], (0.01, 0.05, 0.1, 0.25, 0.5)),
        "between": quantiles(found[~same], (0.5, 0.9, 0.99, 0.999, 1.0)),
    }


def found_at(views: Sequence[Floats], truth: NDArray[np.intp], alike: float) -> dict[str, Any]:
    """What a threshold puts together: shares of pairs and of bursts."""
    groups = grouped(views, [str(number) for number in range(len(views))], alike)
    pairs = [(int(truth[i]), int(truth[j])) for i, j in pairs_of(groups)]
    right = sum(one == other for one, other in pairs)
    wanted = len(np.unique(truth)) * SHOTS * (SHOTS - 1) // 2
    whole = {tuple(group) for group in groups}
    bursts = [tuple(range(n, n + SHOTS)) for n in range(0, len(views), SHOTS)]
    return {
        "alike": alike,
        "precision": right / len(pairs) if pairs else None,
        "recall": right / wanted,
        "whole_bursts": sum(each in whole for each in bursts) / len(bursts),
    }


def pairs_of(groups: Sequence[Sequence[int]]) -> Iterator[tuple[int, int]]:
    for group in groups:
        for place, one in enumerate(group):
            for other in group[place + 1 :]:
                yield one, other


def chosen(bursts: Sequence[Sequence[Image.Image]], package: Path | None) -> dict[str, Any]:
    """How often the best of a burst is the shot that nothing was done to."""
    compared = alone = 0
    with Engine.open(package, learn=False) as engine, Progress(len(bursts)) as progress:
        for shots in bursts:
            for number, shot in enumerate(shots):
                shot.filename = str(number)  # type: ignore[attr-defined]
            # All are taken for alike: who is chosen is asked, not who belongs together.
            culling = engine.cull(shots, alike=0.01)
            group = max(culling.groups, key=len)
            compared += group[0].path == "0"
            alone += max(group, key=lambda photo: photo.alone).path == "0"
            progress.advance()
    count = len(bursts)
    return {"bursts": count, "by_comparing": compared / count, "by_score_alone": alone / count}


def quantiles(values: Floats, shares: Sequence[float]) -> dict[str, float]:
    return {f"{share:g}": round(float(np.quantile(values, share)), 4) for share in shares}


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.shots")
    parser.add_argument("--images", type=Path, required=True, help="photographs")
    parser.add_argument("--package", type=Path)
    parser.add_argument("--bursts", type=int, default=100)
    parser.add_argument("--judged", type=int, default=50, help="bursts judged by the engine")
    options = parser.parse_args(arguments)
    photos = sorted(p for p in options.images.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    random.Random(0).shuffle(photos)
    report = bench_shots(photos[: options.bursts], options.judged, package=options.package)
    sys.stdout.write(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
