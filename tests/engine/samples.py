"""Pictures drawn from a seed, anchor memories of them, and engines without a runtime."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from meiqa.engine.engine import Engine
from meiqa.engine.images import fit_to_grid, load_pixels
from meiqa.engine.local import LocalModel
from meiqa.engine.model import Model, VisualTokens
from meiqa.engine.package import EnginePackage
from meiqa.engine.prompts import PromptFamily
from meiqa.engine.runtime.decoder import GraphSession
from meiqa.engine.scoring import Scorer
from meiqa.memory import AnchorWriter, Case, MemoryBank, RetrievalPolicy
from meiqa.testing import FakeClock, FakeModel
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


def toned(score: float, seed: int = 0, size: tuple[int, int] = (64, 96)) -> Picture:
    """A picture that a `FakeModel` gives about this score, for its brightness."""
    level = 255.0 * (score - 1.0) / 4.0
    contrast = min(level, 255.0 - level, 40.0) / 128.0
    shapes = picture(seed, size).astype(np.float64)
    return (level + contrast * (shapes - shapes.mean())).clip(0, 255).astype(np.uint8)


def relative_difference(exact: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """How long the difference is, as a share of the exact vector."""
    return float(np.linalg.norm(exact - other) / np.linalg.norm(exact))


def open_model(package: EnginePackage, threads: int = 1) -> LocalModel:
    """The package's model on the CPU."""
    return LocalModel.open(package, "cpu", threads)


def asking(model: LocalModel, family: PromptFamily) -> LocalModel:
    """The same model, asked in another family's words; it sees no new pictures."""
    package = model.package
    other = replace(package, manifest=replace(package.manifest, prompt=family))
    return LocalModel(other, cast(GraphSession, None), model.decoder)


def seen(model: Model, pixels: Picture) -> VisualTokens:
    """A picture of any size as the model sees it."""
    return model.encode(fit_to_grid(load_pixels(pixels), model.image))


def build_anchors(path: Path, package: EnginePackage) -> Path:
    """An anchor memory of pictures of four sizes with scores spread over 1-5."""
    pictures = [picture(1000 + number, SIZES[number % len(SIZES)]) for number in range(ANCHORS)]
    return write_anchors(path, open_model(package), pictures)


def write_anchors(path: Path, model: Model, pictures: Sequence[Picture]) -> Path:
    """An anchor memory of pictures, from the worst to the best."""
    with AnchorWriter(path, model.digest, *model.widths) as writer:
        for number, pixels in enumerate(pictures):
            tokens = seen(model, pixels)
            description = model.describe(model.prefill([tokens])[0], 8)
            assert description.key is not None
            writer.add(
                Case(
                    id=f"anchor-{number:02d}",
                    origin="anchor",
                    image_digest=load_pixels(pixels).digest,
                    score=1.0 + 4.0 * number / (len(pictures) - 1),
                    std=0.2,
                    summary=description.text,
                    key=description.key,
                    tokens=tokens.values,
                    grid=tokens.grid,
                )
            )
        writer.finish()
    return path


def fake_anchors(path: Path, count: int = ANCHORS) -> Path:
    """An anchor memory of a `FakeModel`, whose scores are those that it would give."""
    scores = np.linspace(1.0, 5.0, count)
    return write_anchors(
        path, FakeModel(), [toned(score, 2000 + i) for i, score in enumerate(scores)]
    )


def fake_engine(model: FakeModel, anchors: Path, clock: FakeClock | None = None) -> Engine:
    """An engine over a `FakeModel` and its memory, which it only reads; time is the clock's."""
    bank = MemoryBank.open(anchors, "r", package_digest=model.digest)
    scorer = Scorer(model, bank, RetrievalPolicy(k=model.calibration.neighbours))
    if clock is not None:
        scorer.clock = clock
    return Engine(scorer)


def calibrated_copy(package: EnginePackage, folder: Path, **changes: float) -> EnginePackage:
    """A copy of a package with another calibration."""
    shutil.copytree(package.path, folder)
    calibration = replace(package.manifest.calibration, **changes)  # type: ignore[arg-type]
    return EnginePackage(folder, package.manifest).rewritten(calibration=calibration)


def copy_graphs(package: EnginePackage, folder: Path) -> None:
    """Take the graphs of a package."""
    for graph in package.manifest.graphs.values():
        for name in graph.files:
            (folder / name).write_bytes((package.path / name).read_bytes())


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


def smooth_photo() -> Image.Image:
    """Make a smooth 97 x 64 colour picture with a bright top left corner."""
    y, x = np.mgrid[0:64, 0:97]
    channels = [255 - 2 * y - x, 200 - 2 * x + y // 2, 90 + y]
    return Image.fromarray(np.stack(channels, axis=2).clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    """Write an image as Pillow does."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()
