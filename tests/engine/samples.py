"""Pictures drawn from a seed, and an anchor memory of them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from meiqa.engine.images import fit_to_grid, load_pixels
from meiqa.engine.local import LocalVlm
from meiqa.engine.package import EnginePackage
from meiqa.engine.runtime.onnx import open_sessions
from meiqa.engine.vlm import VisualTokens
from meiqa.memory import AnchorWriter, Case, MemoryBank
from meiqa.types import Assessment, Failure

Picture = NDArray[np.uint8]

ANCHORS = 24
K = 8
SIZES = ((160, 224), (256, 128), (192, 192), (70, 330))


def picture(seed: int, size: tuple[int, int] = (160, 224)) -> Picture:
    """Smooth shapes of random colours under a random amount of noise, uint8 (H, W, 3)."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[: size[0], : size[1]]
    waves = [
        np.sin(x / random.uniform(5, 60) + random.uniform(0, 6))
        + np.cos(y / random.uniform(5, 60) + random.uniform(0, 6))
        for _ in range(3)
    ]
    smooth = np.stack(waves, 2) * random.uniform(10, 60) + random.uniform(60, 190, 3)
    noisy = smooth + random.normal(0, random.uniform(0, 40), smooth.shape)
    return noisy.clip(0, 255).astype(np.uint8)


PHOTOS = [picture(seed, SIZES[seed % len(SIZES)]) for seed in range(7)]


def open_vlm(package: EnginePackage, threads: int = 1) -> LocalVlm:
    """The package's model on the CPU."""
    return LocalVlm(package, *open_sessions(package, "cpu", threads))


def seen(vlm: LocalVlm, pixels: Picture) -> VisualTokens:
    """A picture of any size as the model sees it."""
    image = vlm.image
    return vlm.encode(
        fit_to_grid(
            pixels,
            multiple=image.cell_pixels,
            min_pixels=image.min_pixels,
            max_pixels=image.max_pixels,
        )
    )


def build_anchors(path: Path, package: EnginePackage) -> Path:
    """An anchor memory of pictures of four sizes with scores spread over 1-5."""
    vlm = open_vlm(package)
    width = package.manifest.decoder.hidden_size
    with AnchorWriter(path, package.digest, width, width) as writer:
        for number in range(ANCHORS):
            pixels = picture(1000 + number, SIZES[number % len(SIZES)])
            tokens = seen(vlm, pixels)
            description = vlm.describe(vlm.read([tokens])[0], 8)
            writer.add(
                Case(
                    id=f"anchor-{number:02d}",
                    origin="anchor",
                    image_digest=load_pixels(pixels).digest,
                    score=1.0 + 4.0 * number / (ANCHORS - 1),
                    std=0.2,
                    summary=description.text,
                    key=description.key,
                    tokens=tokens.values,
                    grid=tokens.grid,
                )
            )
        writer.finish()
    return path


def calibrated_copy(package: EnginePackage, folder: Path, **changes: float) -> EnginePackage:
    """A copy of a package with another calibration."""
    shutil.copytree(package.path, folder)
    calibration = replace(package.manifest.calibration, **changes)  # type: ignore[arg-type]
    return EnginePackage(folder, package.manifest).with_calibration(calibration)


def read_memory(package: EnginePackage, path: Path) -> MemoryBank:
    """A memory opened read-only."""
    return MemoryBank.open(path, "r", package_digest=package.digest)


def assessed(results: Iterator[Assessment | Failure]) -> list[Assessment]:
    """The results of a run in which every photo could be judged."""
    kept = []
    for result in results:
        assert isinstance(result, Assessment)
        kept.append(result)
    return kept
