"""An engine as it is used: what it takes, what it refuses, and what it gives."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from meiqa.engine.budget import SHORT_SUMMARY_TOKENS, CostModel, Plan
from meiqa.engine.engine import Engine
from meiqa.engine.local import LocalModel
from meiqa.engine.package import EnginePackage
from meiqa.engine.runtime import open_runtime
from meiqa.engine.runtime.decoder import Array, GraphSession
from meiqa.engine.scoring import Scorer, ScoreRequest
from meiqa.errors import AnswerNotFinite, ImageError, UsageError
from meiqa.memory import MemoryBank, RetrievalPolicy
from meiqa.testing import FakeModel
from meiqa.types import Assessment, Failure
from tests.engine.samples import (
    ANCHORS,
    PHOTOS,
    SIZES,
    K,
    Picture,
    assessed,
    fake_engine,
    picture,
    toned,
)


def png(pixels: Picture) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def fake(remembered: Path) -> Engine:
    """Give an engine over a `FakeModel`."""
    return fake_engine(FakeModel(), remembered)


# The whole way, with a tiny random model


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


def test_an_anchor_is_not_compared_with_itself(engine: Engine) -> None:
    result = engine.score(picture(1000, SIZES[0]))
    assert "anchor-00" not in [neighbour.id for neighbour in result.neighbours]
    assert len(result.neighbours) == ANCHORS - 1


def test_two_photos_of_one_size_are_told_apart(engine: Engine) -> None:
    one, other = picture(50, (192, 192)), picture(51, (192, 192))
    first, second = engine.score(one), engine.score(other)
    assert first.summary != second.summary
    assert first.initial_score != second.initial_score
    assert first.score != second.score
    again = engine.score(one)
    assert (again.score, again.summary) == (first.score, first.summary)


def test_the_anchors_prefixes_are_kept(package: EnginePackage, anchors: Path) -> None:
    with Engine.open(package.path, anchors, threads=1, learn=False) as engine:
        cold, warm = engine.score(PHOTOS[0]), engine.score(PHOTOS[0])
    assert warm.counters["reused_tokens"] > cold.counters["reused_tokens"] > 0
    assert warm.counters["anchor_cache_bytes"] == cold.counters["anchor_cache_bytes"] > 0
    assert warm.score == pytest.approx(cold.score, abs=1e-3)


@pytest.mark.slow
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


class Overflowing:
    """A graph whose output is no number, the first time."""

    def __init__(self, session: GraphSession) -> None:
        self._session, self._fails = session, True

    def run(self, inputs: Mapping[str, Array]) -> dict[str, NDArray[np.float32]]:
        made = self._session.run(inputs)
        if self._fails:
            self._fails = False
            made["tokens"] = np.full_like(made["tokens"], np.nan)
        return made


def test_tokens_that_are_no_numbers_fail_one_photo_only(
    package: EnginePackage, anchors: Path
) -> None:
    runtime = open_runtime(package, "cpu", 1)
    model = LocalModel(package, Overflowing(runtime.vision), runtime.decoder)
    bank = MemoryBank.open(anchors, "r", package_digest=package.digest)
    with Engine(Scorer(model, bank, RetrievalPolicy(k=2))) as engine:
        first, second = engine.score_many(PHOTOS[:2], learn=False)
    assert isinstance(first, Failure)
    assert isinstance(first.error, AnswerNotFinite)
    assert "fp32" in str(first.error)
    assert isinstance(second, Assessment)


# What it takes


def test_the_same_pixels_are_read_once_however_they_come(fake: Engine) -> None:
    photo = toned(3.0, 53)
    first = fake.score(photo, k=2)
    assert first.counters["photo_cache_hits"] == 0
    for source in (photo, png(photo), Image.fromarray(photo)):
        again = fake.score(source, k=2)
        assert again.counters["photo_cache_hits"] == 1
        assert again.score == first.score
    fake.forget_photos()
    assert fake.caches()["photos"].used_bytes == 0 < fake.caches()["neighbours"].used_bytes
    assert fake.score(photo, k=2).counters["photo_cache_hits"] == 0


def test_one_pixel_makes_another_photo(fake: Engine) -> None:
    photo = toned(3.0, 52)
    fake.score(photo, k=1)
    changed = photo.copy()
    changed[0, 0, 0] ^= 1
    assert fake.score(changed, k=1).counters["photo_cache_hits"] == 0


def test_a_bad_photo_does_not_stop_the_others(fake: Engine, tmp_path: Path) -> None:
    missing = tmp_path / "missing.jpg"
    elongated = tmp_path / "line.png"
    Image.new("RGB", (300, 2)).save(elongated)
    results = list(fake.score_many([PHOTOS[0], missing, elongated, PHOTOS[1]], k=2))
    assert [type(r) for r in results] == [Assessment, Failure, Failure, Assessment]
    for result, path in zip(results[1:3], (missing, elongated), strict=True):
        assert isinstance(result, Failure)
        assert result.path == str(path)
        assert str(path) in str(result.error)
        assert "\n" not in str(result.error)


def test_one_bad_photo_is_an_error(fake: Engine) -> None:
    with pytest.raises(ImageError):
        fake.score(b"")
    with pytest.raises(ImageError):
        fake.compare(PHOTOS[0], b"")


def test_no_photos(fake: Engine) -> None:
    assert list(fake.score_many([])) == []


def test_a_request_among_photos_brings_its_own_settings(fake: Engine) -> None:
    photos = [PHOTOS[0], ScoreRequest(PHOTOS[1], k=1), ScoreRequest(PHOTOS[2])]
    counts = [len(result.neighbours) for result in assessed(fake.score_many(photos, k=3))]
    assert counts == [3, 1, K]


# What it refuses

ASKS: dict[str, Callable[[Engine, Any], Any]] = {
    "score_many": lambda engine, photos: engine.score_many(photos),
    "rank": lambda engine, photos: engine.rank(photos),
    "cull": lambda engine, photos: engine.cull(photos),
}
SETTINGS: dict[str, Callable[..., Any]] = {
    "score": lambda engine, **settings: engine.score(PHOTOS[0], **settings),
    "score_many": lambda engine, **settings: engine.score_many([], **settings),
    "rank": lambda engine, **settings: engine.rank([], **settings),
    "cull": lambda engine, **settings: engine.cull([], **settings),
}


ONE = {
    "a path's letters": "holiday",
    "a path": Path("holiday"),
    "bytes": b"\xff\xd8\xff",
    "more bytes": bytearray(b"\xff\xd8\xff"),
    "an array": PHOTOS[0],
    "a grey array": PHOTOS[0][..., 0],
    "a Pillow image": Image.fromarray(PHOTOS[0]),
}


@pytest.mark.parametrize("ask", ASKS.values(), ids=list(ASKS))
@pytest.mark.parametrize("one", ONE.values(), ids=list(ONE))
def test_one_photo_is_not_several(
    fake: Engine, ask: Callable[[Engine, Any], Any], one: Any
) -> None:
    with pytest.raises(TypeError, match="give a list of photos"):
        ask(fake, one)


@pytest.mark.parametrize("ask", SETTINGS.values(), ids=list(SETTINGS))
@pytest.mark.parametrize("k", [2.5, 2.0, True, "3", (3,)])
def test_neighbours_are_a_whole_number(fake: Engine, ask: Callable[..., Any], k: Any) -> None:
    with pytest.raises(TypeError, match="k is a whole number"):
        ask(fake, k=k)


@pytest.mark.parametrize("ask", SETTINGS.values(), ids=list(SETTINGS))
def test_neighbours_are_not_negative(fake: Engine, ask: Callable[..., Any]) -> None:
    with pytest.raises(UsageError, match="k must not be negative"):
        ask(fake, k=-1)


@pytest.mark.parametrize("budget", [0.5, 300, "300ms", True])
def test_a_budget_is_a_budget(fake: Engine, budget: Any) -> None:
    for ask in SETTINGS.values():
        with pytest.raises(TypeError, match="a budget is a Budget"):
            ask(fake, budget=budget)
    with pytest.raises(TypeError, match="a budget is a Budget"):
        fake.compare(*PHOTOS[:2], budget=budget)


def test_a_request_of_its_own_is_held_to_the_same(fake: Engine) -> None:
    wrong: Any = 2.5
    results = fake.score_many([PHOTOS[0], ScoreRequest(PHOTOS[1], k=wrong)])
    with pytest.raises(TypeError, match="k is a whole number"):
        list(results)


def test_numpys_whole_numbers_are_whole_numbers(fake: Engine) -> None:
    count: Any = np.int64(3)
    assert len(fake.score(PHOTOS[0], k=count).neighbours) == 3


# What it costs


def test_costs_are_measured_on_photos_and_kept(remembered: Path, tmp_path: Path) -> None:
    model, file = FakeModel(), tmp_path / "costs" / "file.json"
    bank = MemoryBank.open(remembered, "r", package_digest=model.digest)
    scorer = Scorer(model, bank, RetrievalPolicy(k=K), costs_file=file)
    with Engine(scorer) as engine:
        costs = engine.calibrate_costs([toned(score, 8) for score in (2.0, 3.0, 4.0)])
    assert CostModel.read(file) == costs == scorer.costs()
    assert costs.summary_tokens.expected != model.summary_tokens / 2
    later = Scorer(model, bank, RetrievalPolicy(k=K), costs_file=file)
    assert later.costs() == costs


@pytest.mark.parametrize(
    ("k", "least"),
    [(0, Plan(SHORT_SUMMARY_TOKENS, 0)), (2, Plan(0, 2)), (32, Plan(0, 4))],
)
def test_the_least_worth_doing_is_a_few_comparisons_or_a_short_text(
    remembered: Path, k: int, least: Plan
) -> None:
    engine = fake_engine(FakeModel(), remembered)
    engine.scorer.retrieval = RetrievalPolicy(k=k)
    assert engine.least_ms() == engine.scorer.costs().of(least)
