"""Decoding the next photo while the model works on this one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from meiqa.engine.images import ImageSource, Pixels, load_pixels

__all__ = ["Decoding", "decode_ahead"]


@dataclass(frozen=True, eq=False)
class Decoding:
    """A photo that is being decoded.

    Attributes:
        source: what it is decoded from.
    """

    source: ImageSource
    _pixels: Future[Pixels]

    def pixels(self) -> Pixels:
        """Wait for the pixels.

        Raises:
            ImageError: see `load_pixels`.
        """
        return self._pixels.result()


def decode_ahead(images: Iterable[ImageSource]) -> Iterator[Decoding]:
    """Give photos in their order, each with the next one being decoded behind it.

    Never more than one is ahead, so that any number of photos takes the memory of three: one at
    work, one decoded, and what decoding the latter took.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="decode") as pool:
        waiting: Decoding | None = None
        for image in images:
            following = Decoding(image, pool.submit(load_pixels, image))
            if waiting is not None:
                yield waiting
            waiting = following
        if waiting is not None:
            yield waiting
