"""Photographs with human scores → anchors: seen, read and described once, then never again."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from PIL import Image

from meiqa.engine.images import Pixels, load_pixels
from meiqa.engine.judging import fitted_to
from meiqa.engine.package import EnginePackage
from meiqa.engine.vlm import Vlm
from meiqa.errors import ImageError, PackageCorrupted
from meiqa.labels import LabelTable
from meiqa.memory import AnchorWriter, Case, key_widths, retrieval_key
from meiqa.types import Failure, KeyKind

__all__ = ["ANCHOR_STD", "anchor_case", "build_anchors", "thumbnail_of"]

ANCHOR_STD = 0.2
"""Standard error of a mean of 30 opinions that differ by about one point, on the 1-5 scale."""
THUMBNAIL_SIDE = 160
THUMBNAIL_QUALITY = 80


class Describer(Vlm, Protocol):
    """A model that says what it is a model of."""

    @property
    def package(self) -> EnginePackage:
        """Its package."""
        ...


def anchor_case(
    vlm: Describer,
    pixels: Pixels,
    name: str,
    score: float,
    std: float = ANCHOR_STD,
    *,
    key_kind: KeyKind = "summary",
) -> Case:
    """See, read and describe one photograph.

    Args:
        name: id of the anchor.
        score: mean opinion score on 1-5; std: its standard error.
        key_kind: of the memory that it is for.

    Raises:
        ImageError: the photograph cannot be judged.
        PackageCorrupted: the model writes nothing about it.
    """
    prefix = vlm.read([vlm.encode(fitted_to(pixels, vlm.image))])[0]
    description = vlm.describe(prefix, vlm.package.manifest.prompt.summary_tokens)
    if description.key is None:
        raise PackageCorrupted("the model writes nothing about an anchor", seen=name)
    return Case(
        id=name,
        origin="anchor",
        image_digest=pixels.digest,
        score=score,
        std=std,
        summary=description.text,
        key=retrieval_key(key_kind, description.key, prefix.tokens.values),
        tokens=prefix.tokens.values,
        grid=prefix.tokens.grid,
    )


def thumbnail_of(pixels: Pixels) -> bytes:
    """A JPEG of a photograph whose longer side has at most 160 pixels, without metadata."""
    small = Image.fromarray(pixels.array)
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=THUMBNAIL_QUALITY)
    return file.getvalue()


def build_anchors(
    vlm: Describer,
    labels: LabelTable,
    images: Path,
    out: Path,
    *,
    provenance: str = "",
    std: float = ANCHOR_STD,
    key_kind: KeyKind = "summary",
    keep_thumbnails: bool = False,
    on_photo: Callable[[Failure | None], None] = lambda failure: None,
) -> list[Failure]:
    """Write a memory of the photographs of a label table; an interrupted build is gone on with.

    Photographs that cannot be judged are left out.

    Args:
        labels: files below `images`, which become the anchors' ids, and their scores.
        out: directory of the memory; must not exist.
        provenance: where the scores come from, in a few words.
        key_kind: what the anchors are found by.
        keep_thumbnails: keep a small JPEG of each; otherwise no image bytes are kept.
        on_photo: told after each photograph, with its failure if it is left out.

    Returns:
        What was left out.

    Raises:
        StoreError: the memory cannot be written.
        PackageCorrupted: the model writes nothing about a photograph.
    """
    widths = key_widths(key_kind, *vlm.package.widths)
    failures: list[Failure] = []
    writer = AnchorWriter(
        out,
        vlm.package.digest,
        widths.key,
        widths.token,
        key_kind=key_kind,
        keep_thumbnails=keep_thumbnails,
        resume=True,
    )
    with writer:
        for file, score in zip(labels.files, labels.scores_1_to_5(), strict=True):
            failure = None
            if file not in writer.known_ids:
                try:
                    pixels = load_pixels(images / file)
                    case = anchor_case(vlm, pixels, file, score, std, key_kind=key_kind)
                    thumbnail = thumbnail_of(pixels) if keep_thumbnails else None
                    writer.add(case, provenance=provenance, thumbnail=thumbnail)
                except ImageError as error:
                    failure = Failure(str(images / file), error)
                    failures.append(failure)
            on_photo(failure)
        writer.finish()
    return failures
