"""Photos are decoded ahead, in order, and never far."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image

from meiqa.engine.engine import decode_ahead
from meiqa.engine.images import ImageSource, load_pixels
from meiqa.engine.scoring import ScoreRequest
from meiqa.errors import DecodeError
from tests.engine.fake_model import FakeModel
from tests.engine.samples import PHOTOS, fake_engine


def requests(*sources: ImageSource) -> list[ScoreRequest]:
    return [ScoreRequest(source) for source in sources]


def test_order_and_failures_stay_where_they_are() -> None:
    asked = requests(PHOTOS[0], b"no photo", PHOTOS[1])
    given = list(decode_ahead(asked))
    assert [request for request, _ in given] == asked
    (_, first), (_, second), (_, third) = given
    assert first().digest == load_pixels(PHOTOS[0]).digest
    with pytest.raises(DecodeError):
        second()
    assert third().digest == load_pixels(PHOTOS[1]).digest
    assert list(decode_ahead([])) == []


def test_the_next_is_decoded_while_this_one_is_at_work_and_no_other() -> None:
    taken: list[int] = []

    def endless() -> Iterator[ScoreRequest]:
        number = 0
        while True:
            taken.append(number)
            yield ScoreRequest(np.full((20, 20, 3), number % 256, np.uint8))
            number += 1

    ahead = cast(Generator[Any, None, None], decode_ahead(endless()))
    for number in range(5):
        _, decoded = next(ahead)
        assert decoded().array[0, 0, 0] == number
        assert taken == list(range(number + 2))
    ahead.close()


def test_decoding_overlaps_with_work() -> None:
    """The second photo is decoded though nobody has asked for its pixels."""
    photo, decoded = Image.fromarray(PHOTOS[1]), threading.Event()
    plainly = photo.load

    def load() -> Any:
        decoded.set()
        return plainly()

    photo.load = load  # type: ignore[method-assign]
    ahead = cast(Generator[Any, None, None], decode_ahead(requests(PHOTOS[0], photo)))
    next(ahead)
    assert decoded.wait(timeout=30)
    ahead.close()


def test_an_interrupted_run_leaves_no_thread(remembered: Path) -> None:
    engine = fake_engine(FakeModel(), remembered)
    results = cast(Generator[Any, None, None], engine.score_many(PHOTOS[:3], k=0))
    next(results)
    results.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("decode")]
