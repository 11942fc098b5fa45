"""Pictures of where the model fails: distorted photographs that it scores above the untouched one.

    python -m benchmarks.failures DIR --index CSV --licence "Public domain" --out failures.png

Of each type of distortion the worst case is sought at the strongest level, among photographs that
may be shown; drawn are the types in which the score rises most. Training has seen crops of most of
these photographs, which makes what fails on them no better.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from benchmarks.ladder import RUNGS, images_of
from meiqa.engine.engine import Engine
from meiqa.errors import MeiqaError, UsageError
from meiqa.evaluation.plots import STYLE
from meiqa.locations import embedded_assets
from meiqa.progress import Progress
from training.distortions import KINDS

__all__ = ["Failing", "draw", "worst_of_each_type"]

Pixels = NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Failing:
    """A photograph before and after a distortion, with the score of each."""

    photograph: str
    kind: str
    before: Pixels
    after: Pixels
    score_before: float
    score_after: float

    @property
    def rise(self) -> float:
        """By how much the score went up, which it should not."""
        return self.score_after - self.score_before


def worst_of_each_type(
    engine: Engine, photographs: Sequence[Path], on_photograph: Callable[[], None] = lambda: None
) -> list[Failing]:
    """The photograph that each type at its strongest level raises most, the worst type first."""
    worst: dict[str, Failing] = {}
    for photograph in photographs:
        for case in distorted_cases(engine, photograph):
            known = worst.get(case.kind)
            if known is None or case.rise > known.rise:
                worst[case.kind] = case
        on_photograph()
    return sorted(worst.values(), key=lambda case: -case.rise)


def distorted_cases(engine: Engine, photograph: Path) -> Iterator[Failing]:
    """One photograph under each type."""
    images = list(images_of(photograph, KINDS))
    strongest = images[RUNGS::RUNGS]
    before, *after = (engine.score(image, learn=False).score for image in (images[0], *strongest))
    for kind, image, score in zip(KINDS, strongest, after, strict=True):
        yield Failing(photograph.name, kind.name, images[0], image, before, score)


def draw(cases: Sequence[Failing], path: Path) -> None:
    """Draw each case as a row: as it was, and distorted, with the scores."""
    with rc_context(STYLE):
        figure = Figure(figsize=(7.0, 2.5 * len(cases)))
        rows = figure.subplots(len(cases), 2, squeeze=False)
        for case, (left, right) in zip(cases, rows, strict=True):
            show(left, case.before, f"{case.photograph}: {case.score_before:.2f}")
            show(right, case.after, f"{case.kind}: {case.score_after:.2f}")
        figure.savefig(path, dpi=110)


def show(axes: Axes, pixels: Pixels, title: str) -> None:
    """One picture."""
    axes.imshow(pixels)
    axes.set_title(title, fontsize=10)
    axes.set_axis_off()


def licensed(index: Path, wanted: Sequence[str]) -> list[str]:
    """Files of an index whose licence begins with one of the wanted, by name."""
    with index.open(newline="") as table:
        rows = list(csv.DictReader(table))
    return sorted(row["file"] for row in rows if row["licence"].startswith(tuple(wanted)))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.failures")
    parser.add_argument("images", type=Path, help="folder of pristine photographs")
    parser.add_argument("--index", type=Path, required=True, help="CSV: file, size, licence")
    parser.add_argument(
        "--licence",
        nargs="+",
        default=["Public domain"],
        help="how it begins; one or several",
    )
    parser.add_argument("--rows", type=int, default=6, help="cases to draw")
    parser.add_argument("--out", type=Path, required=True, help="a PNG file")
    arguments = parser.parse_args()
    try:
        names = licensed(arguments.index, arguments.licence)
        if not names:
            raise UsageError("no photograph has such a licence", seen=arguments.licence)
        with (
            Engine.open(memory=embedded_assets() / "memory", learn=False) as engine,
            Progress(len(names)) as progress,
        ):
            photographs = [arguments.images / name for name in names]
            cases = worst_of_each_type(engine, photographs, progress.advance)
    except MeiqaError as error:
        sys.exit(str(error))
    draw(cases[: arguments.rows], arguments.out)
    rises = [f"{case.kind:24} {case.rise:+.2f}  {case.photograph}" for case in cases]
    sys.stdout.write("\n".join(rises) + "\n")


if __name__ == "__main__":
    main()
