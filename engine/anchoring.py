"""Photographs with human scores → anchors: seen, read and described once, then never again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from meiqa.engine.images import ImageSource, load_pixels
from meiqa.engine.pipeline import fitted_to
from meiqa.engine.vlm import LocalVlm
from meiqa.errors import ImageError, PackageCorrupted
from meiqa.labels import LabelTable
from meiqa.memory import AnchorWriter, Case
from meiqa.types import Failure

__all__ = ["ANCHOR_STD", "anchor_case", "build_anchors"]

ANCHOR_STD = 0.2
"""Standard error of a mean of 30 opinions that differ by about one point, on the 1-5 scale."""


def anchor_case(
    vlm: LocalVlm, image: ImageSource, name: str, score: float, std: float = ANCHOR_STD
) -> Case:
    """See, read and describe one photograph.

    Args:
        name: id of the anchor.
        score: mean opinion score on 1-5; std: its standard error.

    Raises:
        ImageError: the photograph cannot be judged.
        PackageCorrupted: the model writes nothing about it.
    """
    pixels = load_pixels(image)
    prefix = vlm.read([vlm.encode(fitted_to(pixels, vlm.image))])[0]
    description = vlm.describe(prefix, vlm.prompts.family.summary_tokens)
    if description.key is None:
        raise PackageCorrupted("the model writes nothing about an anchor", seen=name)
    return Case(
        id=name,
        origin="anchor",
        image_digest=pixels.digest,
        score=score,
        std=std,
        summary=description.text,
        key=description.key,
        tokens=prefix.tokens.values,
        grid=prefix.tokens.grid,
    )


def build_anchors(
    vlm: LocalVlm,
    labels: LabelTable,
    images: Path,
    out: Path,
    *,
    provenance: str = "",
    std: float = ANCHOR_STD,
    on_photo: Callable[[Failure | None], None] = lambda failure: None,
) -> list[Failure]:
    """Write a memory of the photographs of a label table; an interrupted build is gone on with.

    Photographs that cannot be judged are left out.

    Args:
        labels: files below `images`, which become the anchors' ids, and their scores.
        out: directory of the memory; must not exist.
        provenance: where the scores come from, in a few words.
        on_photo: told after each photograph, with its failure if it is left out.

    Returns:
        What was left out.

    Raises:
        StoreError: the memory cannot be written.
        PackageCorrupted: the model writes nothing about a photograph.
    """
    widths = vlm.shape
    failures: list[Failure] = []
    writer = AnchorWriter(
        out, vlm.package.digest, widths.hidden_size, widths.embed_width, resume=True
    )
    with writer:
        for file, score in zip(labels.files, labels.scores_1_to_5(), strict=True):
            failure = None
            if file not in writer.known_ids:
                try:
                    case = anchor_case(vlm, images / file, file, score, std)
                    writer.add(case, provenance=provenance)
                except ImageError as error:
                    failure = Failure(str(images / file), error)
                    failures.append(failure)
            on_photo(failure)
        writer.finish()
    return failures
