"""`meiqa score … --reference REF --map FILE`: a photo beside what it should look like."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from meiqa.commands.options import file_to_write
from meiqa.errors import UsageError

if TYPE_CHECKING:
    from meiqa.engine.pipeline import Engine

__all__ = ["add_reference", "refuse_unusable_reference", "write_distortion_map"]


def add_reference(command: argparse.ArgumentParser) -> None:
    """Add the options of the reference mode."""
    command.add_argument(
        "--reference",
        metavar="REF",
        help="the photo as it should be, of the same shape; nothing is learned then",
    )
    command.add_argument(
        "--map",
        type=file_to_write,
        metavar="FILE",
        help="write the photo with a heat map of its distortions over it, as PNG; of one photo",
    )


def refuse_unusable_reference(options: argparse.Namespace, photos: Sequence[str]) -> None:
    """Refuse options that do not go together.

    Raises:
        UsageError: they don't.
    """
    if options.output is not None and (options.reference or options.map):
        raise UsageError(
            "--output takes neither --reference nor --map",
            hint="redirect the output instead: meiqa score … --format csv > FILE",
        )
    if options.map is not None and len(photos) != 1:
        raise UsageError("--map is of one photo", seen=f"{len(photos)} photos")


def write_distortion_map(engine: Engine, photo: str, options: argparse.Namespace) -> None:
    """Write the photo with the map of its distortions."""
    from meiqa.engine.images import load_pixels
    from meiqa.engine.reference import write_map

    pixels = load_pixels(photo).array
    opinion = engine.patterns(photo, options.reference)
    write_map(options.map, pixels, opinion.over(*pixels.shape[:2]))
