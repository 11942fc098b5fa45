"""Photos are decoded ahead, in order, and never far."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest

from meiqa.engine import decoding
from meiqa.engine.decoding import decode_ahead
from meiqa.engine.images import ImageSource, Pixels, load_pixels
from meiqa.engine.pipeline import Engine
from meiqa.errors import DecodeError
from tests.engine.samples import PHOTOS


def test_order_and_failures_stay_where_they_are() -> None:
    sources: list[ImageSource] = [PHOTOS[0], b"no photo", PHOTOS[1]]
    given = list(decode_ahead(sources))
    assert all(photo.source is source for photo, source in zip(given, sources, strict=True))
    assert given[0].pixels().digest == load_pixels(PHOTOS[0]).digest
    with pytest.raises(DecodeError):
        given[1].pixels()
    assert given[2].pixels().digest == load_pixels(PHOTOS[1]).digest
    assert list(decode_ahead([])) == []


def test_the_next_is_decoded_while_this_one_is_at_work_and_no_other() -> None:
    taken: list[int] = []

    def endless() -> Iterator[ImageSource]:
        number = 0
        while True:
            taken.append(number)
            yield np.full((20, 20, 3), number % 256, np.uint8)
            number += 1

    ahead = decode_ahead(endless())
    for number in range(5):
        assert next(ahead).pixels().array[0, 0, 0] == number
        assert taken == list(range(number + 2))
    ahead.close()  # type: ignore[attr-defined]


def test_decoding_overlaps_with_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second photo is decoded though nobody has asked for its pixels."""
    decoded = threading.Event()

    def note(source: ImageSource) -> Pixels:
        if source is PHOTOS[1]:
            decoded.set()
        return load_pixels(source)

    monkeypatch.setattr(decoding, "load_pixels", note)
    ahead = decode_ahead([PHOTOS[0], PHOTOS[1]])
    next(ahead)
    assert decoded.wait(timeout=30)
    ahead.close()  # type: ignore[attr-defined]


def test_an_interrupted_run_leaves_no_thread(engine: Engine) -> None:
    results = engine.score_many([*PHOTOS[:3]], k=0, learn=False)
    next(results)
    results.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("decode")]
