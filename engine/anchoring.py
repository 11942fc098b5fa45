"""Photographs with human scores → anchors: seen, read and described once, then never again."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from meiqa.engine.images import Pixels, fit_to_grid, load_pixels
from meiqa.engine.model import Model
from meiqa.errors import ImageError, PackageCorrupted
from meiqa.labels import LabelTable
from meiqa.memory import AnchorWriter, Case, key_widths, retrieval_key
from meiqa.types import Failure, KeyKind

ANCHOR_STD = 0.2
"""Standard error of a mean of 30 opinions that differ by about one point, on the 1-5 scale."""
THUMBNAIL_SIDE = 160
THUMBNAIL_QUALITY = 80


@dataclass(frozen=True)
class AnchorOptions:
    """What is kept of anchors.

    Attributes:
        provenance: where the scores come from, in a few words; std: their standard error.
        keep_thumbnails: keep a small JPEG of each; otherwise no image bytes are kept.
    """

    provenance: str = ""
    std: float = ANCHOR_STD
    key_kind: KeyKind = "summary"
    keep_thumbnails: bool = False


def anchor_case(
    model: Model, pixels: Pixels, name: str, score: float, options: AnchorOptions
) -> Case:
    """See, read and describe one photograph with a mean opinion score on 1-5."""
    (prefix,) = model.prefill([model.encode(fit_to_grid(pixels, model.image))])
    description = model.describe(prefix, model.summary_tokens)
    if description.key is None:
        raise PackageCorrupted("the model writes nothing about an anchor", seen=name)
    return Case(
        id=name,
        origin="anchor",
        image_digest=pixels.digest,
        score=score,
        std=options.std,
        summary=description.text,
        key=retrieval_key(options.key_kind, description.key, prefix.tokens.values),
        tokens=prefix.tokens.values,
        grid=prefix.tokens.grid,
    )


def thumbnail_of(pixels: Pixels) -> bytes:
    """Make a JPEG of a photograph whose longer side has at most 160 pixels, without metadata."""
    small = Image.fromarray(pixels.array)
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=THUMBNAIL_QUALITY)
    return file.getvalue()


def build_anchors(
    model: Model,
    labels: LabelTable,
    images: Path,
    out: Path,
    options: AnchorOptions = AnchorOptions(),
    on_photo: Callable[[Failure | None], None] = lambda failure: None,
) -> list[Failure]:
    """Write a memory of the photographs of a label table; an interrupted build is gone on with.

    Photographs that cannot be judged are left out, and given.

    Args:
        labels: files below `images`, which become the anchors' ids, and their scores.
        out: directory of the memory; must not exist.
        on_photo: told after each photograph, with its failure if it is left out.
    """
    widths = key_widths(options.key_kind, *model.widths)
    failures: list[Failure] = []
    writer = AnchorWriter(
        out,
        model.digest,
        widths.key,
        widths.token,
        key_kind=options.key_kind,
        keep_thumbnails=options.keep_thumbnails,
        resume=True,
    )
    with writer:
        for file, score in zip(labels.files, labels.scores_1_to_5(), strict=True):
            failure = None
            if file not in writer.known_ids:
                try:
                    pixels = load_pixels(images / file)
                    case = anchor_case(model, pixels, file, score, options)
                    thumbnail = thumbnail_of(pixels) if options.keep_thumbnails else None
                    writer.add(case, provenance=options.provenance, thumbnail=thumbnail)
                except ImageError as error:
                    failure = Failure(str(images / file), error)
                    failures.append(failure)
            on_photo(failure)
        writer.finish()
    return failures
