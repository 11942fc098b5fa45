"""Photographs with human scores → anchors: seen, read and described once, then never again."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, partial
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


@dataclass(frozen=True)
class Anchored:
    """A photograph that became an anchor, with its thumbnail if one is kept."""

    case: Case
    thumbnail: bytes | None


class AnchorMaker:
    """Makes anchors of files; it can be pickled before its first call.

    Args:
        open_model: gives the model, once.
        images: where files are.
    """

    def __init__(
        self, open_model: Callable[[], Model], images: Path, options: AnchorOptions
    ) -> None:
        self._open, self._images, self._options = open_model, images, options

    @cached_property
    def _model(self) -> Model:
        return self._open()

    def __call__(self, labelled: tuple[str, float]) -> Anchored | Failure:
        """Make an anchor of a file and its score; a Failure if it can't be judged."""
        file, score = labelled
        try:
            pixels = load_pixels(self._images / file)
            case = anchor_case(self._model, pixels, file, score, self._options)
        except ImageError as error:
            return Failure(str(self._images / file), error)
        return Anchored(case, thumbnail_of(pixels) if self._options.keep_thumbnails else None)


def build_anchors(
    model: Model,
    labels: LabelTable,
    images: Path,
    out: Path,
    options: AnchorOptions = AnchorOptions(),
    on_photo: Callable[[Failure | None], None] = lambda failure: None,
    make: Callable[[list[tuple[str, float]]], Iterable[Anchored | Failure]] | None = None,
) -> list[Failure]:
    """Write a memory of the photographs of a label table; an interrupted build is gone on with.

    Photographs that cannot be judged are left out, and given.

    Args:
        labels: files below `images`, which become the anchors' ids, and their scores.
        out: directory of the memory; must not exist.
        on_photo: told after each photograph, with its failure if it is left out.
        make: what an `AnchorMaker` makes of files and scores, in their order; by default here.
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
    make = make or partial(map, AnchorMaker(lambda: model, images, options))
    with writer:
        labelled = list(zip(labels.files, labels.scores_1_to_5(), strict=True))
        waiting = [each for each in labelled if each[0] not in writer.known_ids]
        for _ in range(len(labelled) - len(waiting)):
            on_photo(None)
        for made in make(waiting) if waiting else ():
            failure = made if isinstance(made, Failure) else None
            if isinstance(made, Anchored):
                writer.add(made.case, provenance=options.provenance, thumbnail=made.thumbnail)
            else:
                failures.append(made)
            on_photo(failure)
        writer.finish()
    return failures
