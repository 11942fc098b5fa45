"""The whole way of a photo through an engine with a tiny random model."""

from __future__ import annotations

import io
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from meiqa.engine import judging
from meiqa.engine.local import LocalVlm
from meiqa.engine.package import EnginePackage
from meiqa.engine.pipeline import Engine
from meiqa.engine.planning import Plan
from meiqa.engine.runtime.base import Array, GraphSession
from meiqa.engine.runtime.onnx import open_sessions
from meiqa.errors import AnswerNotFinite, ImageError, UsageError
from meiqa.types import Assessment, Failure
from tests.engine.samples import (
    ANCHORS,
    PHOTOS,
    SIZES,
    K,
    Picture,
    assessed,
    calibrated_copy,
    picture,
    read_memory,
)


def png(pixels: Picture) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_it_shows_the_whole_way(engine: Engine) -> None:
    result = engine.score(PHOTOS[0])
    assert 1 <= result.ci95[0] <= result.score <= result.ci95[1] <= 5
    assert result.score != result.initial_score
    assert result.summary
    assert 0 <= result.percentile <= 100
    assert len(result.neighbours) == ANCHORS
    preferences = [neighbour.preference for neighbour in result.neighbours]
    assert all(p is not None and 0 <= p <= 1 for p in preferences)
    assert result.counters["comparisons"] == 2 * ANCHORS
    stages = {"decode", "read", "describe", "retrieve", "compare", "fuse", "total"}
    assert stages <= result.timings_ms.keys()


def test_without_neighbours_the_first_opinion_stands(
    package: EnginePackage, anchors: Path, tmp_path: Path
) -> None:
    copy = calibrated_copy(package, tmp_path / "copy", grade_share=0.0)
    with Engine.open(copy.path, anchors, threads=1, learn=False) as engine:
        result = engine.score(PHOTOS[0], k=0)
    assert result.neighbours == ()
    assert result.score == result.initial_score
    assert result.std == copy.manifest.calibration.text_std
    assert result.reflection is None


def test_k_neighbours(engine: Engine) -> None:
    assert len(engine.score(PHOTOS[1], k=5).neighbours) == 5
    with pytest.raises(UsageError, match="k must not be negative"):
        engine.score(PHOTOS[1], k=-1)


def test_an_anchor_is_not_compared_with_itself(engine: Engine) -> None:
    result = engine.score(picture(1000, SIZES[0]))
    assert "anchor-00" not in [neighbour.id for neighbour in result.neighbours]
    assert len(result.neighbours) == ANCHORS - 1


def test_an_unreadable_rating_is_said(
    package: EnginePackage, anchors: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    note = "rating unreadable: scored by grade word"
    with Engine.open(package.path, anchors, threads=1, learn=False) as engine:
        for rating, said in ((None, True), (2.5, False)):
            monkeypatch.setattr(LocalVlm, "_rating", lambda *_, rating=rating: rating)
            result = engine.score(PHOTOS[2], k=2)
            assert (note in result.degraded) == said
            assert (result.initial_score == 2.5) == (not said)


def test_two_photos_side_by_side(engine: Engine) -> None:
    forth = engine.compare(PHOTOS[0], PHOTOS[1])
    back = engine.compare(PHOTOS[1], PHOTOS[0])
    assert forth.preference == pytest.approx(1 - back.preference, abs=1e-4)
    assert (forth.first_score, forth.second_score) == pytest.approx(
        (back.second_score, back.first_score), abs=1e-3
    )
    assert engine.compare(PHOTOS[0], PHOTOS[0]).preference == pytest.approx(0.5, abs=1e-4)


def test_a_bad_photo_does_not_stop_the_others(engine: Engine, tmp_path: Path) -> None:
    missing = tmp_path / "missing.jpg"
    elongated = tmp_path / "line.png"
    Image.new("RGB", (300, 2)).save(elongated)
    results = list(engine.score_many([PHOTOS[0], missing, elongated, PHOTOS[1]], k=2))
    assert [type(r) for r in results] == [Assessment, Failure, Failure, Assessment]
    for result, path in zip(results[1:3], (missing, elongated), strict=True):
        assert isinstance(result, Failure)
        assert result.path == str(path)
        assert str(path) in str(result.error)
        assert "\n" not in str(result.error)


def test_one_bad_photo_is_an_error(engine: Engine) -> None:
    with pytest.raises(ImageError):
        engine.score(b"")


def test_no_photos(engine: Engine) -> None:
    assert list(engine.score_many([])) == []


def test_two_photos_of_one_size_are_told_apart(engine: Engine) -> None:
    one, other = picture(50, (192, 192)), picture(51, (192, 192))
    first, second = engine.score(one), engine.score(other)
    assert first.summary != second.summary
    assert first.initial_score != second.initial_score
    assert first.score != second.score
    again = engine.score(one)
    assert (again.score, again.summary) == (first.score, first.summary)


def test_one_pixel_makes_another_photo(engine: Engine) -> None:
    photo = picture(52, (192, 192))
    engine.score(photo, k=1)
    changed = photo.copy()
    changed[0, 0, 0] ^= 1
    assert engine.score(changed, k=1).counters["photo_cache_hits"] == 0


def test_the_same_pixels_are_read_once_however_they_come(engine: Engine) -> None:
    photo = picture(53)
    first = engine.score(photo, k=2)
    assert first.counters["photo_cache_hits"] == 0
    for source in (photo, png(photo), Image.fromarray(photo)):
        again = engine.score(source, k=2)
        assert again.counters["photo_cache_hits"] == 1
        assert again.score == first.score


def test_the_anchors_prefixes_are_kept(package: EnginePackage, anchors: Path) -> None:
    with Engine.open(package.path, anchors, threads=1, learn=False) as engine:
        cold, warm = engine.score(PHOTOS[0]), engine.score(PHOTOS[0])
    assert warm.counters["reused_tokens"] > cold.counters["reused_tokens"] > 0
    assert warm.counters["anchor_cache_bytes"] == cold.counters["anchor_cache_bytes"] > 0
    assert warm.score == pytest.approx(cold.score, abs=1e-3)


def test_threads_share_an_engine(engine: Engine) -> None:
    wanted = [result.score for result in assessed(engine.score_many(PHOTOS[:3], k=K))]
    found: dict[int, float] = {}

    def work(numbers: Sequence[int]) -> None:
        for number in numbers:
            found[number] = engine.score(PHOTOS[number], k=K).score

    workers = [threading.Thread(target=work, args=([0, 1, 2][n:],)) for n in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [found[n] for n in range(3)] == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize("fitted", [True, False])
def test_without_an_image_key_the_choice_of_neighbours_says_so(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, fitted: bool
) -> None:
    monkeypatch.setattr(judging, "plan_work", lambda *_: Plan(0, 3, both_orders=True))
    if not fitted:
        width = engine.package.manifest.decoder.hidden_size
        monkeypatch.setattr(judging, "projected_key", lambda *_: np.zeros(width, np.float32))
    result = engine.score(PHOTOS[2], learn=False)
    assert len(result.neighbours) == 3
    assert any("no image key" in note for note in result.degraded) is not fitted


class Overflowing:
    """A graph whose output is no number, the first so many times."""

    def __init__(self, session: GraphSession, output: str, times: int) -> None:
        self._session, self._output, self._times = session, output, times

    def run(self, inputs: Mapping[str, Array]) -> dict[str, NDArray[np.float32]]:
        made = self._session.run(inputs)
        if self._times:
            self._times -= 1
            made[self._output] = np.full_like(made[self._output], np.nan)
        return made


@pytest.mark.parametrize(("graph", "output"), [("_vision", "tokens"), ("_decoder", "logits")])
def test_an_answer_that_is_no_number_fails_one_photo_only(
    package: EnginePackage, anchors: Path, graph: str, output: str
) -> None:
    vlm = LocalVlm(package, *open_sessions(package, "cpu", 1))
    setattr(vlm, graph, Overflowing(getattr(vlm, graph), output, times=1))
    with Engine(vlm, package, read_memory(package, anchors)) as engine:
        first, second = engine.score_many(PHOTOS[:2], learn=False)
    assert isinstance(first, Failure)
    assert isinstance(first.error, AnswerNotFinite)
    assert "fp32" in str(first.error)
    assert isinstance(second, Assessment)
