"""Aligned pictures for the patterns: photographs under KADID's distortions, as visual tokens.

    python -m training.pattern_pairs --data DATA --work WORK --package PACKAGE

All versions of one view are aligned, so any two of them are a pair of photograph and reference, a
degraded one where neither is the untouched version. The package's own vision graph sees them: what
the patterns learn is what they will be shown. A photograph is a file of its own, so a run that was
stopped goes on where it was.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from functools import cache, partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from meiqa.engine.images import fit_to_grid, load_pixels
from meiqa.engine.local import LocalModel
from meiqa.engine.package import EnginePackage
from training.commands import run_command
from training.data import PRISTINE_SCORE, name_hash, pristine_names
from training.distortions import KINDS, LEVELS, TWO_SIDED, distort, kadid_scores

FOLDERS = {False: "patterns", True: "patterns-unseen"}
"""Where pictures lie in the work folder: those to train on, and those kept unseen."""
LARGEST_SIDE, SMALLEST_SIDE = 8, 4
"""Sides of a cropped view, in cells."""
PARTS = 6
"""Versions of a photograph of which only a part is distorted."""

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Views:
    """The versions of a photograph's views.

    Attributes:
        tokens: (T, D) float16, of all versions one after the other.
        grids: (N, 2) rows and columns of each version.
        views: (N,) which view a version is of; versions of one view are aligned.
        kinds, levels: (N,) KADID's distortion, 0 where there is none.
        scores: (N,) KADID's mean human score of that type and level; NaN where only a part of the
            picture is distorted, about which people were not asked.
        touched: (T,) cells that are distorted.
    """

    tokens: NDArray[np.float16]
    grids: NDArray[np.int64]
    views: NDArray[np.int64]
    kinds: NDArray[np.int64]
    levels: NDArray[np.int64]
    scores: NDArray[np.float32]
    touched: NDArray[np.bool_]

    def write(self, path: Path) -> None:
        """Write whole or not at all."""
        unfinished = path.with_suffix(".tmp")
        with unfinished.open("wb") as file:
            np.savez(file, **{field.name: getattr(self, field.name) for field in fields(self)})
        unfinished.rename(path)

    @classmethod
    def read(cls, path: Path) -> Views:
        """Read what `write` wrote."""
        with np.load(path, allow_pickle=False) as stored:
            return cls(**{field.name: stored[field.name] for field in fields(cls)})


@dataclass(frozen=True)
class Version:
    """One version of a view: its distortion, 0 and 0 where there is none.

    `part` are the top, left, bottom and right shares of the cells that are distorted.
    """

    view: int
    kind: int
    level: int
    part: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)

    def mask(self, grid: tuple[int, int]) -> NDArray[np.bool_]:
        """Cells (h, w) that are distorted."""
        mask = np.zeros(grid, bool)
        (top, left, bottom, right), (rows, columns) = self.part, grid
        if self.kind:
            mask[
                round(top * rows) : max(round(bottom * rows), round(top * rows) + 1),
                round(left * columns) : max(round(right * columns), round(left * columns) + 1),
            ] = True
        return mask

    @property
    def whole(self) -> bool:
        """Whether all of the picture is distorted, or none."""
        return self.part == WHOLE


WHOLE = (0.0, 0.0, 1.0, 1.0)


def read_views(work: Path, *, unseen: bool) -> list[Views]:
    """All photographs that were prepared, by name."""
    return [Views.read(path) for path in sorted((work / FOLDERS[unseen]).glob("*.npz"))]


def prepare(data: Path, work: Path, package: Path, workers: int, *, unseen: bool) -> None:
    """Distort and encode the photographs that are not there yet."""
    folder = work / FOLDERS[unseen]
    folder.mkdir(parents=True, exist_ok=True)
    scores = kadid_scores(data / "labels" / "KADID-10k.txt")
    names = pristine_names(data, held_out=unseen)
    missing = [name for name in names if not made_of(folder, name).exists()]
    make = partial(write_views, data, folder, package, scores, unseen)
    with ProcessPoolExecutor(workers) as pool:
        for count, _ in enumerate(pool.map(make, missing), 1):
            if count % 10 == 0:
                print(f"{folder.name}: {count} of {len(missing)}", flush=True)


def made_of(folder: Path, name: str) -> Path:
    """The file of a photograph's views."""
    return folder / f"{Path(name).stem}.npz"


def write_views(
    data: Path,
    folder: Path,
    package: Path,
    scores: NDArray[np.float32],
    unseen: bool,
    name: str,
) -> None:
    """Make one photograph's views: all types at all levels of unseen ones, else at one level."""
    source = np.array(load_pixels(data / "pristine" / "images" / name).array)
    seed = int(name_hash(name)[:16], 16)
    rng = np.random.default_rng(seed)
    views = [source] if unseen else [source, cropped(source, rng)]
    versions = all_versions() if unseen else drawn_versions(len(views), rng)
    versions += parts_of(len(views) - 1, PARTS, rng)
    model = encoder(package)
    tokens, grids, touched = [], [], []
    for version in versions:
        view = views[version.view]
        if not version.whole:  # so that the part ends where cells do
            view = fit_to_grid(load_pixels(view), model.image)
        made = version_of(view, version, [seed], model.image.cell_pixels)
        seen = model.encode(fit_to_grid(load_pixels(made), model.image))
        tokens.append(seen.values.astype(np.float16))
        grids.append(seen.grid)
        touched.append(version.mask(seen.grid).ravel())
    Views(
        np.concatenate(tokens),
        np.array(grids),
        np.array([v.view for v in versions]),
        np.array([v.kind for v in versions]),
        np.array([v.level for v in versions]),
        np.array([score_of(v, scores) for v in versions], np.float32),
        np.concatenate(touched),
    ).write(made_of(folder, name))


def version_of(pixels: Bytes, version: Version, seed: list[int], cell: int = 64) -> Bytes:
    """A view under a version's distortion; random parts are the same at each level."""
    if version.kind == 0:
        return pixels
    rng = np.random.default_rng([*seed, version.kind])
    made = distort(np.ascontiguousarray(pixels), version.kind, version.level, rng)
    if version.whole:
        return made
    mask = version.mask((pixels.shape[0] // cell, pixels.shape[1] // cell))
    return np.where(mask.repeat(cell, 0).repeat(cell, 1)[..., None], made, pixels)


def score_of(version: Version, scores: NDArray[np.float32]) -> float:
    """What people give such a distortion."""
    if not version.whole:
        return float("nan")
    return float(scores[version.kind - 1, version.level - 1]) if version.kind else PRISTINE_SCORE


def parts_of(view: int, count: int, rng: np.random.Generator) -> list[Version]:
    """A view whose parts, about a sixth to a half of it, are distorted visibly."""
    made = []
    for _ in range(count):
        sides = rng.uniform(0.4, 0.7, 2)
        (top, left), sides = rng.uniform(0, 1 - sides), sides
        part = (float(top), float(left), float(top + sides[0]), float(left + sides[1]))
        kind = int(rng.integers(1, len(KINDS) + 1))
        level = int(rng.choice([1, 5]) if kind in TWO_SIDED else rng.integers(3, LEVELS + 1))
        made.append(Version(view, kind, level, part))
    return made


def all_versions() -> list[Version]:
    """One view untouched and under every type at every level."""
    made = [Version(0, kind.number, level) for kind in KINDS for level in range(1, LEVELS + 1)]
    return [Version(0, 0, 0), *made]


def drawn_versions(views: int, rng: np.random.Generator) -> list[Version]:
    """Each view untouched and under every type, at a level that is drawn."""
    drawn = []
    for view in range(views):
        drawn.append(Version(view, 0, 0))
        drawn += [Version(view, k.number, int(rng.integers(1, LEVELS + 1))) for k in KINDS]
    return drawn


def cropped(pixels: Bytes, rng: np.random.Generator, cell: int = 64) -> Bytes:
    """A random crop of whole cells."""
    most = np.minimum(np.array(pixels.shape[:2]) // cell, LARGEST_SIDE)
    rows, columns = (int(rng.integers(SMALLEST_SIDE, side + 1)) * cell for side in most)
    top = int(rng.integers(pixels.shape[0] - rows + 1))
    left = int(rng.integers(pixels.shape[1] - columns + 1))
    return np.ascontiguousarray(pixels[top : top + rows, left : left + columns])


@cache
def encoder(package: Path) -> LocalModel:
    """The package's model on one thread of this process."""
    opened = EnginePackage.open(package)
    return LocalModel.open(opened, threads=1)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m training.pattern_pairs", description=__doc__)
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with pristine/ and labels/"
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--package", type=Path, required=True, help="whose vision graph sees them")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", choices=("seen", "unseen"), help="one part of the photographs")
    given = parser.parse_args()
    parts = {None: (False, True), "seen": (False,), "unseen": (True,)}
    for unseen in parts[given.only]:
        prepare(given.data, given.work, given.package, given.workers, unseen=unseen)


if __name__ == "__main__":
    run_command(main)
