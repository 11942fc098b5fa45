"""What the routes answer, over the tiny random model."""

from __future__ import annotations

import base64
import json
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from meiqa.engine.anchoring import AnchorOptions, anchor_case
from meiqa.engine.asking import Question
from meiqa.engine.engine import Engine
from meiqa.engine.images import NamedBytes, load_pixels
from meiqa.engine.package import EnginePackage
from meiqa.serve.access import Keys, Settings
from meiqa.serve.middleware import log_to
from meiqa.types import Budget
from tests.serve.conftest import Serve, jpeg


@pytest.fixture
def learning(package: EnginePackage, memory: Path) -> Engine:
    """Give an engine whose memory may be written."""
    return Engine.open(package.path, memory, threads=1)


@pytest.fixture
def memory(anchors: Path, tmp_path: Path) -> Path:
    """Give a memory that may be written."""
    import shutil

    return Path(shutil.copytree(anchors, tmp_path / "memory"))


def test_a_photo_is_scored_as_the_engine_does(api: TestClient, engine: Engine) -> None:
    photo = jpeg(1)
    alone = engine.score(photo, budget=Budget(ms=1e6), k=4, learn=False)
    raw = api.post("/v1/score?k=4", content=photo, headers={"Content-Type": "image/jpeg"})
    form = api.post("/v1/score?k=4", files={"image": ("holiday/one.jpg", photo)})
    assert raw.status_code == form.status_code == 200
    assert raw.json()["score"] == pytest.approx(alone.score, abs=1e-3)
    assert raw.json()["path"] == "image"
    assert form.json()["path"] == "one.jpg"
    expected = json.loads(json.dumps(alone.to_dict()))
    for name in ("summary", "word", "neighbours", "degraded"):
        assert form.json()[name] == expected[name]
    assert "queue" in form.json()["timings_ms"]


def test_photos_that_wait_together_get_what_they_get_alone(api: TestClient, engine: Engine) -> None:
    photos = [jpeg(seed) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda photo: api.post("/v1/score?k=4", content=photo), photos))
    for photo, answer in zip(photos, answers, strict=True):
        alone = engine.score(photo, budget=Budget(ms=1e6), k=4, learn=False)
        assert answer.json()["score"] == pytest.approx(alone.score, abs=1e-3)
        assert answer.json()["summary"] == alone.summary


def test_one_that_cannot_be_judged_spoils_no_other(api: TestClient) -> None:
    bodies = [jpeg(1), b"no photo", jpeg(2), jpeg(3)[:300], b""]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda body: api.post("/v1/score?k=2", content=body), bodies))
    assert [answer.status_code for answer in answers] == [200, 422, 200, 422, 422]


def test_two_photos_are_compared(api: TestClient, engine: Engine) -> None:
    photos = {"first": ("a.jpg", jpeg(1)), "second": ("b.jpg", jpeg(2))}
    found = api.post("/v1/compare", files=photos).json()
    alone = engine.compare(jpeg(1), jpeg(2), budget=Budget(ms=1e6))
    assert (found["first"], found["second"]) == ("a.jpg", "b.jpg")
    assert found["preference"] == pytest.approx(alone.preference, abs=1e-4)
    assert found["first_score"] == pytest.approx(alone.first_score, abs=1e-3)


def test_options_are_as_probable_as_for_the_engine(api: TestClient, engine: Engine) -> None:
    asked = {"question": ["Is it blurred?", "Is it dark?"], "option": ["yes", "no, not at all"]}
    answer = api.post("/v1/options", params=asked, content=jpeg(1)).json()["answers"]
    for found, question in zip(answer, asked["question"], strict=True):
        alone = engine.options(jpeg(1), question, asked["option"])
        assert found["question"] == question
        assert found["probabilities"] == pytest.approx(alone.probabilities, abs=1e-4)
        assert found["logprobs"] == pytest.approx(alone.logprobs, abs=1e-3)
        assert found["second"] is None


def test_questions_of_pairs(api: TestClient, engine: Engine) -> None:
    files = [("image", ("a.jpg", jpeg(1))), *(("second", ("b.jpg", jpeg(n))) for n in (2, 3))]
    asked = "/v1/options?question=Which is darker?&option=1&option=2&reply=Picture "
    answers = api.post(asked, files=files).json()["answers"]
    assert [each["second"] for each in answers] == ["b.jpg", "b.jpg (2)"]
    pair = Question("Which is darker?", ["1", "2"], second=jpeg(3), reply="Picture ")
    (alone,) = engine.options_many(jpeg(1), [pair])
    assert answers[1]["probabilities"] == pytest.approx(alone.probabilities, abs=1e-4)


def test_several_photos_are_ranked_and_told_apart(api: TestClient) -> None:
    files = [("images", ("same.jpg", jpeg(seed))) for seed in range(3)]
    files.append(("images", ("broken.jpg", b"broken")))
    found = api.post("/v1/rank?k=2", files=files).json()
    assert sorted(photo["path"] for photo in found["photos"]) == [
        "same.jpg",
        "same.jpg (2)",
        "same.jpg (3)",
    ]
    assert [photo["rank"] for photo in found["photos"]] == [1, 2, 3]
    assert [failure["path"] for failure in found["failures"]] == ["broken.jpg"]


def test_a_reference_is_used_or_refused(api: TestClient) -> None:
    files = {"image": ("a.jpg", jpeg(1)), "reference": ("b.jpg", jpeg(2))}
    answer = api.post("/v1/score?k=2", files=files)
    assert answer.status_code in (200, 422)  # the tiny package has no patterns to use one
    if answer.status_code == 422:
        assert answer.json()["type"] == "urn:meiqa:problem:usage-error"


def test_the_model_and_its_limits_are_named(api: TestClient, package: EnginePackage) -> None:
    found = api.get("/v1/model").json()
    assert found["digest"] == package.digest
    assert found["memory"] == {"anchors": 24, "contrast": 0}
    assert found["limits"]["budget_ms"] == 30_000


def test_a_memory_is_listed_page_by_page(api: TestClient) -> None:
    first = api.get("/v1/memory/cases?limit=20&origin=anchor").json()
    second = api.get(f"/v1/memory/cases?limit=20&offset={first['next']}").json()
    assert (len(first["cases"]), len(second["cases"]), second["next"]) == (20, 4, None)
    assert first["total"] == 24
    assert first["cases"][0]["id"] == "anchor-00"


def test_a_case_is_added_used_and_removed(
    serve: Serve, learning: Engine, keys: tuple[Keys, str, str]
) -> None:
    known, _, writer = keys
    with learning:
        api = serve(Settings(budget_ms=30_000, keys=known), learning)
        api.headers["Authorization"] = f"Bearer {writer}"
        path = "/v1/memory/cases?id=mine&score=4.5&provenance=me"
        added = api.post(path, files={"image": ("x.jpg", jpeg(50))})
        assert added.status_code == 201
        assert (added.json()["id"], added.json()["score"]) == ("mine", 4.5)
        assert api.get("/v1/model").json()["memory"]["anchors"] == 25
        ids = [case["id"] for case in api.get("/v1/memory/cases").json()["cases"]]
        assert "mine" in ids
        removed = api.delete("/v1/memory/cases?id=mine&id=other")
        assert removed.json() == {"removed": 1}
        assert api.post("/v1/score?learn=true&k=2", content=jpeg(3)).status_code == 200
        api.close()


def test_some_remembered_photos_are_given_with_thumbnails_where_they_are_kept(
    serve: Serve, learning: Engine
) -> None:
    with learning:
        for seed, name, thumbnail in ((7, "new", jpeg(9)), (8, "anchor-03", None)):
            pixels = load_pixels(jpeg(seed))
            case = anchor_case(learning.model, pixels, name, 4.5, AnchorOptions())
            learning.memory.add_anchor(case, provenance="me", thumbnail=thumbnail)
        learning.memory.remove(["anchor-04"])
        api = serve(Settings(), learning)
        asked = ["new", "anchor-02", "anchor-03", "anchor-04", "nobody", "new"]
        found = api.get("/v1/memory/cases/chosen", params={"id": asked}).json()["cases"]
        assert [each["id"] for each in found] == ["new", "anchor-02", "anchor-03"]
        assert base64.b64decode(found[0]["thumbnail"]) == jpeg(9)
        assert [each["thumbnail"] for each in found[1:]] == [None, None]
        assert (found[2]["score"], found[2]["provenance"]) == (4.5, "me")
        assert all(each["summary"] for each in found[1:2])
        assert api.get("/v1/memory/cases/chosen").status_code == 422
        api.close()


def test_a_memory_that_is_read_only_says_so(serve: Serve, keys: tuple[Keys, str, str]) -> None:
    api = serve(Settings(keys=keys[0]))
    headers = {"Authorization": f"Bearer {keys[2]}"}
    answer = api.delete("/v1/memory/cases?id=mine", headers=headers)
    assert answer.status_code in (409, 503)
    assert answer.json()["what"]


def test_a_request_keeps_its_id(api: TestClient) -> None:
    given = api.post("/v1/score", content=b"", headers={"X-Request-Id": "abc-1"})
    assert given.headers["X-Request-Id"] == given.json()["request_id"] == "abc-1"
    made = api.get("/healthz", headers={"X-Request-Id": "no good\tid"})
    assert len(made.headers["X-Request-Id"]) == 32


def test_errors_are_problem_details(api: TestClient) -> None:
    answer = api.post("/v1/score?k=2", content=b"nothing that is a photo")
    problem = answer.json()
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert (problem["status"], problem["title"]) == (422, "Decode error")
    assert problem["type"] == "urn:meiqa:problem:decode-error"
    assert "JPEG" in problem["allowed"]
    assert problem["retryable"] is False


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/nothing", 404),
        ("GET", "/v1/score", 405),
        ("POST", "/v1/score?budget_ms=-1", 422),
        ("POST", "/v1/score?budget_ms=nan", 422),
        ("POST", "/v1/score?budget_ms=1e9", 422),
        ("POST", "/v1/score?k=-1", 422),
        ("POST", "/v1/score?k=many", 422),
        ("POST", "/v1/compare", 422),
        ("POST", "/v1/options?question=Why", 422),
        ("POST", "/v1/options?question=Why&option=yes&option=yes", 422),
        ("POST", "/v1/options?question=W" + "&option=yes" * 1025, 422),
        ("GET", "/v1/memory/cases?limit=0", 422),
        ("GET", "/v1/memory/cases?origin=moon", 422),
        ("GET", "/docs", 404),
    ],
)
def test_wrong_requests_are_problems_too(
    api: TestClient, method: str, path: str, status: int
) -> None:
    answer = api.request(method, path)
    assert answer.status_code == status
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert answer.json()["status"] == status


def test_what_nobody_foresaw_says_nothing_about_the_inside(
    serve: Serve, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("the secret of the house")

    api = serve(Settings())
    monkeypatch.setattr(engine, "score_many", broken)
    with pytest.raises(RuntimeError):  # the test client shows what uvicorn would log
        api.post("/v1/score", content=jpeg(1))
    quiet = TestClient(api.app, base_url="http://localhost", raise_server_exceptions=False)
    answer = quiet.post("/v1/score", content=jpeg(1))
    assert answer.status_code == 500
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert "secret" not in answer.text


def test_the_service_tells_how_it_is(api: TestClient) -> None:
    api.post("/v1/score?k=2", content=jpeg(1))
    assert api.get("/healthz").json() == {"status": "ok"}
    assert api.get("/readyz").json() == {"status": "ready"}
    counted = api.get("/metrics").text
    assert 'meiqa_requests_total{route="/v1/score",status="200"}' in counted
    assert 'meiqa_stage_seconds_bucket{le="0.005",stage="read"}' in counted
    assert "meiqa_held_bytes 0.0" in counted


def test_requests_are_logged_as_json_and_without_secrets(
    serve: Serve, keys: tuple[Keys, str, str], tmp_path: Path
) -> None:
    known, reader, _ = keys
    root, ours = logging.getLogger(), logging.getLogger("meiqa")
    before = root.handlers, root.level, ours.level
    file = tmp_path / "log"
    try:
        with file.open("w") as stream:
            log_to(stream, "json")
            api = serve(Settings(keys=known))
            api.get("/v1/model?secret=1", headers={"Authorization": f"Bearer {reader}"})
            api.get("/v1/model", headers={"Authorization": "Bearer wrong-secret"})
    finally:
        root.handlers, root.level = before[0], before[1]
        ours.setLevel(before[2])
    text = file.read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["status"] for line in lines if "status" in line] == [200, 401]
    assert (lines[-2]["key"], lines[-2]["path"]) == ("reader", "/v1/model")
    assert "secret" not in text
    assert reader not in text


def test_several_engines_share_the_work(serve: Serve, engine: Engine) -> None:
    from meiqa.serve.app import create_app

    app = create_app([engine, engine.beside(threads=1)], Settings(budget_ms=30_000))
    with TestClient(app, base_url="http://localhost") as api, ThreadPoolExecutor(6) as pool:
        names = {thread.name for thread in threading.enumerate()}
        assert {"engine-0", "engine-1"} <= names
        photos = [jpeg(seed) for seed in range(6)]
        answers = list(pool.map(lambda photo: api.post("/v1/score?k=4", content=photo), photos))
    for photo, answer in zip(photos, answers, strict=True):
        alone = engine.score(photo, budget=Budget(ms=1e6), k=4, learn=False)
        assert answer.json()["score"] == pytest.approx(alone.score, abs=1e-3)


def test_a_photo_is_called_by_its_name_in_messages(engine: Engine) -> None:
    from meiqa.errors import DecodeError

    with pytest.raises(DecodeError, match=r"^holiday\.jpg is not an image"):
        engine.score(NamedBytes(b"nothing", "holiday.jpg"))
