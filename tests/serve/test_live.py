"""The protocol of /v1/live, with an engine that judges greys."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient
from starlette.testclient import WebSocketTestSession
from starlette.websockets import WebSocketDisconnect

from meiqa.serve import live
from meiqa.serve.access import Keys, Settings
from meiqa.serve.app import create_app
from meiqa.serve.camera import FAST_NEIGHBOURS, MOST_KEPT
from meiqa.serve.live import MOST_FRAME_BYTES
from meiqa.serve.routes import Service
from tests.serve.fakes import FakeEngine, StageCosts, grey

LIVE = "ws://localhost/v1/live"
WAIT_S = 60.0
"""Nothing takes so long: it only ends a test that would hang."""
HELLO = {"type": "hello", "token": None, "camera_hz": 30}
KEEPING = {**HELLO, "best": True}
TOKENS_BYTES = 4
"""Of what `FakeEngine` sees of a frame."""


@pytest.fixture
def greys() -> Iterator[FakeEngine]:
    """Give an engine, and let it go in the end."""
    engine = FakeEngine()
    yield engine
    engine.open.set()


def client_of(engine: FakeEngine, settings: Settings | None = None) -> TestClient:
    settings = settings or Settings(budget_ms=60_000)
    return TestClient(create_app([engine], settings), base_url="http://localhost")


@pytest.fixture
def client(greys: FakeEngine) -> Iterator[TestClient]:
    """Give a service without keys, which is never too busy for a frame."""
    with client_of(greys) as client:
        greys.forget()
        yield client


def ask(camera: WebSocketTestSession, jpeg: bytes) -> Any:
    camera.send_bytes(jpeg)
    return camera.receive_json()


def held_bytes(client: TestClient) -> float:
    service: Service = client.app.state.service  # type: ignore[attr-defined]
    value = service.metrics.registry.get_sample_value("meiqa_held_bytes")
    assert value is not None
    return value


def test_every_frame_gets_an_answer_with_its_number(client: TestClient) -> None:
    with client.websocket_connect(LIVE) as camera:
        camera.send_json(HELLO)
        ready = camera.receive_json()
        assert (ready["type"], ready["max_pixels"]) == ("ready", 262_144)
        for number, level in enumerate((200, 100, 20)):
            answer = ask(camera, grey(level))
            assert (answer["type"], answer["frame"], answer["dropped"]) == ("answer", number, 0)
            assert answer["assessment"]["score"] == pytest.approx(1 + 4 * level / 255, abs=0.02)
        assert answer["assessment"]["distortions"][0]["kind"] == "darkening"
        assert set(answer["instruction"]) == {"code", "text", "reason", "good"}


def test_the_fast_path_asks_few_neighbours_and_never_learns(
    client: TestClient, greys: FakeEngine
) -> None:
    with client.websocket_connect(LIVE) as camera:
        camera.send_json(HELLO)
        camera.receive_json()
        answer = ask(camera, grey(120))
    assert answer["kind"] == "fast"
    assert answer["budget_ms"] > 0
    assert greys.asked == [("frame 0", FAST_NEIGHBOURS, False)]


def test_a_still_picture_is_assessed_in_full(
    client: TestClient, greys: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter(0.25 * i for i in range(1000))
    monkeypatch.setattr(live, "clock", lambda: next(now))
    with client.websocket_connect(LIVE) as camera:
        camera.send_json(HELLO)
        camera.receive_json()
        answers = [ask(camera, grey(120)) for _ in range(6)]
    assert [answer["kind"] for answer in answers].count("full") == 1
    full = next(answer for answer in answers if answer["kind"] == "full")
    assert full["assessment"]["summary"] == "An even picture."
    assert (full["stands"], full["budget_ms"]) == (True, None)
    assert answers[-1]["stands"]
    assert ("frame", None) not in [(name, k) for name, k, _ in greys.asked[:2]]


def test_the_dark_gets_the_right_instruction(client: TestClient) -> None:
    with client.websocket_connect(LIVE) as camera:
        camera.send_json(HELLO)
        camera.receive_json()
        assert ask(camera, grey(20))["instruction"]["code"] == "more-light"


def test_frames_are_dropped_not_queued(client: TestClient, greys: FakeEngine) -> None:
    greys.open.clear()
    with client.websocket_connect(LIVE) as camera:
        camera.send_json(HELLO)
        camera.receive_json()
        camera.send_bytes(grey(10))
        assert greys.begun.wait(WAIT_S)
        last = grey(50, (96, 128))
        for frame in (grey(20), grey(30), grey(40), last):
            camera.send_bytes(frame)
        while held_bytes(client) != len(grey(10)) + len(last):
            time.sleep(0.001)  # until the last one has come, and all but two are gone
        greys.open.set()
        first, second = camera.receive_json(), camera.receive_json()
        assert (first["frame"], second["frame"], second["dropped"]) == (0, 4, 3)
        assert second["assessment"]["score"] == pytest.approx(1 + 4 * 50 / 255, abs=0.02)


def test_a_broken_frame_is_a_problem_and_the_next_one_an_answer(client: TestClient) -> None:
    with client.websocket_connect(LIVE) as camera:
        camera.send_json(HELLO)
        camera.receive_json()
        broken = ask(camera, b"not a photo")
        assert (broken["type"], broken["frame"]) == ("problem", 0)
        assert broken["problem"]["status"] == 422
        tiny = ask(camera, grey(100)[:100])
        assert tiny["problem"]["type"] == "urn:meiqa:problem:decode-error"
        assert ask(camera, grey(100))["type"] == "answer"


def test_a_failing_engine_is_a_problem_without_particulars(
    client: TestClient, greys: FakeEngine
) -> None:
    greys.fails = RuntimeError("secret path")
    with client.websocket_connect(LIVE) as camera:
        camera.send_json(HELLO)
        camera.receive_json()
        answer = ask(camera, grey(100))
        assert answer["problem"]["status"] == 500
        assert "secret" not in str(answer)
        greys.fails = None
        assert ask(camera, grey(100))["type"] == "answer"


def test_nothing_is_held_once_the_camera_is_gone(client: TestClient, greys: FakeEngine) -> None:
    greys.open.clear()
    with client.websocket_connect(LIVE) as camera:
        camera.send_json(HELLO)
        camera.receive_json()
        camera.send_bytes(grey(10))
        assert greys.begun.wait(WAIT_S)
        camera.send_bytes(grey(20))
    greys.open.set()
    assert held_bytes(client) == 0
    with client.websocket_connect(LIVE) as camera:
        camera.send_json(HELLO)
        camera.receive_json()
        assert ask(camera, grey(100))["frame"] == 0


@pytest.mark.parametrize(
    "hello", ["", "[]", "{}", "not JSON", '{"type": "hi"}', "[" * 4000, " " * 5000]
)
def test_who_does_not_say_hello_is_turned_away(client: TestClient, hello: str) -> None:
    with client.websocket_connect(LIVE) as camera:
        camera.send_text(hello)
        assert camera.receive_json()["problem"]["status"] == 422
        with pytest.raises(WebSocketDisconnect) as closed:
            camera.receive_json()
        assert closed.value.code == 1008


@pytest.mark.parametrize(
    ("message", "code"), [("words", 1008), (b"", 1008), (b"x" * (MOST_FRAME_BYTES + 1), 1009)]
)
def test_what_is_no_frame_ends_it(client: TestClient, message: str | bytes, code: int) -> None:
    with client.websocket_connect(LIVE) as camera:
        camera.send_json(HELLO)
        camera.receive_json()
        if isinstance(message, str):
            camera.send_text(message)
        else:
            camera.send_bytes(message)
        assert camera.receive_json()["type"] == "problem"
        with pytest.raises(WebSocketDisconnect) as closed:
            camera.receive_json()
        assert closed.value.code == code


def test_with_keys_a_camera_needs_one(greys: FakeEngine, keys: tuple[Keys, str, str]) -> None:
    known, reader, _ = keys
    with client_of(greys, Settings(budget_ms=60_000, keys=known)) as client:
        for token in (None, "guess", 7):
            with client.websocket_connect(LIVE) as camera:
                camera.send_json({**HELLO, "token": token})
                assert camera.receive_json()["problem"]["status"] == 401
        with client.websocket_connect(LIVE) as camera:
            camera.send_json({**HELLO, "token": reader})
            assert camera.receive_json()["type"] == "ready"


def test_a_frame_is_compared_with_the_best_of_its_scene(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter(0.6 * i for i in range(1000))
    monkeypatch.setattr(live, "clock", lambda: next(now))
    with client.websocket_connect(LIVE) as camera:
        camera.send_json(HELLO)
        camera.receive_json()
        changes = [ask(camera, grey(level))["change"] for level in (100, 200, 30, 201)]
    assert [each["code"] for each in changes] == ["new", "better", "worse", "better"]
    assert [each["best"] for each in changes] == [True, True, False, True]
    assert changes[1]["text"] == changes[3]["text"] == "Hold it: the best of the last 5 s"
    assert changes[2]["text"] == "Darker than the last"
    assert changes[2]["level"] == pytest.approx(1 + 4 * 30 / 255, abs=0.1)
    assert {each["scene"] for each in changes} == {1}


def test_the_best_frame_of_a_window_comes_as_it_was_sent(client: TestClient) -> None:
    frames = [grey(level) for level in (100, 200, 30)]
    with client.websocket_connect(LIVE) as camera:
        camera.send_json(KEEPING)
        camera.receive_json()
        for frame in frames:
            ask(camera, frame)
        for request in ({"type": "best"}, {"type": "best", "seconds": 10}):
            camera.send_json(request)
            best = camera.receive_json()
            assert camera.receive_bytes() == frames[1]
            assert (best["type"], best["bytes"]) == ("best", len(frames[1]))
            assert best["assessment"]["path"] == "frame 1"
            assert best["assessment"]["score"] == pytest.approx(1 + 4 * 200 / 255, abs=0.02)
            assert best["level"] == pytest.approx(best["assessment"]["score"], abs=0.1)
            assert 0 <= best["age_s"] < WAIT_S
        assert ask(camera, grey(50))["type"] == "answer"


def test_without_a_frame_there_is_no_best(client: TestClient) -> None:
    with client.websocket_connect(LIVE) as camera:
        camera.send_json(KEEPING)
        camera.receive_json()
        camera.send_json({"type": "best", "seconds": 2})
        answer = camera.receive_json()
        assert (answer["type"], answer["problem"]["status"]) == ("problem", 422)
        assert "no frame" in answer["problem"]["what"]
        assert ask(camera, grey(50))["type"] == "answer"


@pytest.mark.parametrize(
    "request_",
    [
        *('{"type": "best", "seconds": 0}', '{"type": "best", "seconds": 11}'),
        *('{"type": "best", "seconds": true}', '{"type": "best", "seconds": "5"}'),
        *('{"type": "best", "seconds": NaN}', '{"type": "worst"}', "[]", "[" * 4000),
    ],
)
def test_no_other_window_can_be_asked_for(client: TestClient, request_: str) -> None:
    with client.websocket_connect(LIVE) as camera:
        camera.send_json(KEEPING)
        camera.receive_json()
        ask(camera, grey(100))
        camera.send_text(request_)
        problem = camera.receive_json()["problem"]
        assert '"best"' in problem["allowed"]
        with pytest.raises(WebSocketDisconnect) as closed:
            camera.receive_json()
        assert closed.value.code == 1008


def test_what_is_kept_of_a_camera_is_counted_and_bounded(client: TestClient) -> None:
    with client.websocket_connect(LIVE) as camera:
        camera.send_json(KEEPING)
        camera.receive_json()
        for level in range(200, 100, -2):  # each worse than the one before: all worth keeping
            ask(camera, grey(level))
        most = MOST_KEPT * (len(grey(200)) + TOKENS_BYTES)
        assert 2 * len(grey(100)) < held_bytes(client) <= most
    while held_bytes(client):
        time.sleep(0.001)


def test_where_frames_cannot_be_kept_answers_go_on(greys: FakeEngine) -> None:
    limit = int(3.5 * len(grey(200)))
    with client_of(greys, Settings(budget_ms=60_000, max_held_bytes=limit)) as client:
        with client.websocket_connect(LIVE) as camera:
            camera.send_json(KEEPING)
            camera.receive_json()
            answers = [ask(camera, grey(level)) for level in range(200, 180, -2)]
            assert {answer["type"] for answer in answers} == {"answer"}
            assert held_bytes(client) <= limit
        while held_bytes(client):
            time.sleep(0.001)


def test_frames_of_who_does_not_ask_for_it_are_not_kept(client: TestClient) -> None:
    with client.websocket_connect(LIVE) as camera:
        camera.send_json(HELLO)
        camera.receive_json()
        for level in range(200, 100, -10):
            ask(camera, grey(level))
        assert 0 < held_bytes(client) <= MOST_KEPT * TOKENS_BYTES
        camera.send_json({"type": "best"})
        assert '"best": true' in camera.receive_json()["problem"]["hint"]
        with pytest.raises(WebSocketDisconnect):
            camera.receive_json()


def test_a_full_look_that_ran_out_of_time_does_not_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(0.25 * i for i in range(1000))
    monkeypatch.setattr(live, "clock", lambda: next(now))
    hurried = FakeEngine(StageCosts(text_ms=1e9, short_text_ms=1e9))
    with client_of(hurried) as client, client.websocket_connect(LIVE) as camera:
        camera.send_json(HELLO)
        camera.receive_json()
        answers = [ask(camera, grey(120)) for _ in range(30)]
    tried = [answer for answer in answers if answer["kind"] == "full"]
    assert 2 <= len(tried) <= 5
    assert not any(answer["stands"] for answer in answers)
    assert {answer["assessment"]["summary"] for answer in tried} == {None}


def test_an_allowed_sites_page_is_let_in(greys: FakeEngine) -> None:
    settings = Settings(budget_ms=60_000, origins=("https://app.example",))
    with client_of(greys, settings) as client:
        headers = {"Origin": "https://app.example"}
        with client.websocket_connect(LIVE, headers=headers) as camera:
            camera.send_json(HELLO)
            assert camera.receive_json()["type"] == "ready"
        for origin in ("https://app.example:444", "http://app.example", "null"):
            with (
                pytest.raises(WebSocketDisconnect),
                client.websocket_connect(LIVE, headers={"Origin": origin}),
            ):
                pass


def test_another_sites_page_gets_nowhere(client: TestClient) -> None:
    with (
        pytest.raises(WebSocketDisconnect) as closed,
        client.websocket_connect(LIVE, headers={"Origin": "https://elsewhere.example"}),
    ):
        pass
    assert closed.value.code == 1008


def test_a_busy_service_says_so_and_goes_on(greys: FakeEngine) -> None:
    with client_of(greys, Settings(budget_ms=100, reserve_ms=50_000)) as client:
        greys.forget()
        greys.open.clear()
        asking = threading.Thread(
            target=client.post,
            args=("/v1/score?budget_ms=60000",),
            kwargs={"content": grey(200), "headers": {"Content-Type": "image/jpeg"}},
        )
        asking.start()
        assert greys.begun.wait(WAIT_S)
        with client.websocket_connect(LIVE) as camera:
            camera.send_json(HELLO)
            camera.receive_json()
            answer = ask(camera, grey(100))
            assert answer["problem"]["retryable"]
            assert answer["problem"]["retry_after_ms"] > 0
            greys.open.set()
            asking.join()
            assert ask(camera, grey(100))["type"] == "answer"


def test_a_frame_that_the_service_cannot_hold_ends_it(greys: FakeEngine) -> None:
    settings = Settings(budget_ms=60_000, max_held_bytes=len(grey(100)) - 1)
    with client_of(greys, settings) as client, client.websocket_connect(LIVE) as camera:
        camera.send_json(HELLO)
        camera.receive_json()
        camera.send_bytes(grey(100))
        assert camera.receive_json()["problem"]["type"] == "urn:meiqa:problem:overloaded"
        with pytest.raises(WebSocketDisconnect) as closed:
            camera.receive_json()
        assert closed.value.code == 1013
        assert held_bytes(client) == 0
