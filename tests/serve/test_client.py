"""Both clients give what the engine gives, and raise what the engine raises."""

from __future__ import annotations

import asyncio
import inspect
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from meiqa import errors
from meiqa.client import AsyncClient, Client, Retries
from meiqa.engine.engine import Engine
from meiqa.errors import (
    AccessDenied,
    DecodeError,
    ImageTooLarge,
    KeyRequired,
    MeiqaError,
    Overloaded,
    ServiceError,
    ServiceUnreachable,
    StoreLocked,
    UsageError,
)
from meiqa.serve.responses import problem_of, status_of
from meiqa.types import Assessment, Budget, Failure
from tests.serve.conftest import jpeg

Answer = Callable[[httpx.Request], httpx.Response]
Ask = Callable[..., Any]
"""Called with what answers, the name of a method and its arguments; `client` has a client's own."""


class Transport(httpx.BaseTransport, httpx.AsyncBaseTransport):
    """Hands requests of either client to a function."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        request.read()
        return self._answer(request)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        await request.aread()
        return self._answer(request)


def ask_blocking(
    answer: Answer, name: str, *args: Any, client: dict[str, Any] | None = None, **options: Any
) -> Any:
    with Client("http://localhost", transport=Transport(answer), **client or {}) as asked:
        found = getattr(asked, name)(*args, **options)
        return list(found) if isinstance(found, Iterator) else found


def ask_async(
    answer: Answer, name: str, *args: Any, client: dict[str, Any] | None = None, **options: Any
) -> Any:
    async def run() -> Any:
        transport = Transport(answer)
        async with AsyncClient("http://localhost", transport=transport, **client or {}) as asked:
            found = getattr(asked, name)(*args, **options)
            if hasattr(found, "__aiter__"):
                return [each async for each in found]
            return await found

    return asyncio.run(run())


@pytest.fixture(params=[ask_blocking, ask_async], ids=["Client", "AsyncClient"])
def ask(request: pytest.FixtureRequest) -> Ask:
    """Give a function that asks with one of the clients."""
    made: Ask = request.param
    return made


@pytest.fixture
def service(api: TestClient) -> Answer:
    """Give what answers as a service in this process."""

    def answer(request: httpx.Request) -> httpx.Response:
        headers = dict(request.headers.items())
        sent = api.request(
            request.method, str(request.url), content=request.content, headers=headers
        )
        return httpx.Response(sent.status_code, headers=dict(sent.headers), content=sent.content)

    return answer


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Give the seconds that clients pause for, none of which pass."""
    paused: list[float] = []

    async def pause(seconds: float) -> None:
        paused.append(seconds)

    monkeypatch.setattr(time, "sleep", paused.append)
    monkeypatch.setattr(asyncio, "sleep", pause)
    return paused


def test_a_score_comes_back_as_an_assessment(
    ask: Ask, service: Answer, engine: Engine, tmp_path: Path
) -> None:
    file = tmp_path / "one.jpg"
    file.write_bytes(jpeg(1))
    found = ask(service, "score", file, budget_ms=30_000, k=4, embedding=True)
    alone = engine.score(file, budget=Budget(ms=1e6), k=4, learn=False, embedding=True)
    assert isinstance(found, Assessment)
    assert found.path == "one.jpg"
    assert found.score == pytest.approx(alone.score, abs=1e-3)
    assert [each.id for each in found.neighbours] == [each.id for each in alone.neighbours]
    assert math.isnan(found.neighbours[0].std)  # it is not sent
    assert isinstance(found.ci95, tuple)
    assert found.to_dict().keys() == alone.to_dict().keys()
    assert found.embedding is not None
    assert found.to_dict()["embedding"] == alone.to_dict()["embedding"]
    assert found.detail.jpeg == alone.detail.jpeg


def test_everything_else_comes_back_typed(ask: Ask, service: Answer) -> None:
    pair = ask(service, "compare", jpeg(1), jpeg(1))
    assert pair.preference == pytest.approx(0.5)
    assert pair.degraded == ()
    ranking = ask(service, "rank", [jpeg(1), jpeg(2), b"broken"], k=2)
    assert [photo.rank for photo in ranking.photos] == [1, 2]
    (failure,) = ranking.failures
    assert isinstance(failure, Failure)
    assert str(failure.error).startswith("image (3) is not an image")
    (answer,) = ask(service, "options", jpeg(1), ["Is it dark?"], ["yes", "no"], seconds=[jpeg(2)])
    assert answer.best in ("yes", "no")
    assert sum(answer.probabilities.values()) == pytest.approx(1, abs=1e-3)
    assert len(ask(service, "cases")) == 24
    assert ask(service, "cases", "anchor")[0].id == "anchor-00"
    assert ask(service, "model")["memory"]["anchors"] == 24
    kinds = [type(each) for each in ask(service, "score_many", [jpeg(1), b"broken"], k=2)]
    assert kinds == [Assessment, Failure]


def test_errors_are_the_librarys_own(ask: Ask, service: Answer) -> None:
    with pytest.raises(DecodeError, match="not an image") as refused:
        ask(service, "score", b"broken")
    assert "JPEG" in str(refused.value.allowed)
    with pytest.raises(UsageError, match="budget"):
        ask(service, "score", jpeg(1), budget_ms=1e9)
    with pytest.raises(AccessDenied, match="without keys"):
        ask(service, "add_case", jpeg(1), id="a", score=3)
    with pytest.raises(AccessDenied):
        ask(service, "remove_cases", ["a"])
    with pytest.raises(DecodeError, match="cannot be read"):
        ask(service, "score", "/no/such/photo.jpg")


def busy(times: int, after: str) -> tuple[Answer, list[str]]:
    """A service that refuses so many times, and what it was asked."""
    asked: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.method)
        if len(asked) <= times:
            problem = problem_of(Overloaded("too busy"), "id")
            return httpx.Response(503, json=problem, headers={"Retry-After": after})
        return httpx.Response(200, json={"version": "1"})

    return answer, asked


def test_it_asks_again_when_the_service_says(ask: Ask, pauses: list[float]) -> None:
    answer, asked = busy(1, "1")
    assert ask(answer, "model") == {"version": "1"}
    assert (len(asked), pauses) == (2, [1.0])


def test_it_does_not_ask_for_ever(ask: Ask, pauses: list[float]) -> None:
    for retries, after, tries in ((Retries(most=2, longest_s=9), "0", 3), (Retries(), "60", 1)):
        answer, asked = busy(99, after)
        with pytest.raises(Overloaded):
            ask(answer, "model", client={"retries": retries})
        assert len(asked) == tries


def test_what_changes_something_is_not_repeated_on_a_broken_connection(
    ask: Ask, pauses: list[float]
) -> None:
    asked = []

    def broken(request: httpx.Request) -> httpx.Response:
        asked.append(request.method)
        raise httpx.ReadError("gone")

    for name, *args in (["model"], ["remove_cases", ["a"]]):
        with pytest.raises(ServiceUnreachable, match="gone"):
            ask(broken, name, *args, client={"retries": Retries(most=1)})
    assert asked == ["GET", "GET", "DELETE"]
    assert pauses == [0.2]


def test_the_key_is_sent_and_not_shown(ask: Ask) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        given = request.headers["Authorization"] == "Bearer s3cret"
        return httpx.Response(200, json={"given": given})

    assert ask(answer, "model", client={"api_key": "s3cret"}) == {"given": True}
    assert "s3cret" not in repr(Client(api_key="s3cret")) + repr(AsyncClient(api_key="s3cret"))


@pytest.mark.parametrize("body", [b"<html>", b"[]", b"null", b'{"type": 3}', b""])
def test_whatever_answers_an_error_is_one(ask: Ask, body: bytes) -> None:
    with pytest.raises(ServiceError):
        ask(lambda request: httpx.Response(502, content=body), "model")


def test_a_timeout_is_an_error_of_ours(ask: Ask) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        assert request.extensions["timeout"]["read"] == 65.0  # the budget, and some time beside
        raise httpx.ReadTimeout("slow")

    with pytest.raises(ServiceUnreachable):
        ask(answer, "score", b"x", budget_ms=60_000, client={"retries": Retries(most=0)})


def test_what_a_newer_service_tells_beside_is_passed_over(ask: Ask) -> None:
    page = {"cases": [{**CASE, "colour": "red"}], "next": None}
    (case,) = ask(lambda request: httpx.Response(200, json=page), "cases")
    assert case.id == "a"


def test_a_failures_hint_is_told_once(ask: Ask) -> None:
    broken = {"path": "a.jpg", "error": "it is broken; fetch it again", "hint": "fetch it again"}
    found = {"photos": [], "failures": [broken], "degraded": ["no summary"]}
    ranking = ask(lambda request: httpx.Response(200, json=found), "rank", [b"x"])
    assert ranking.failures[0].to_dict() == broken
    assert ranking.degraded == ("no summary",)


CASE = {
    "id": "a",
    "origin": "anchor",
    "score": 3.0,
    "std": 0.2,
    "summary": "",
    "provenance": "",
    "created": 0.0,
}


def test_both_clients_have_the_same_methods() -> None:
    def methods(client: type) -> dict[str, list[str]]:
        public = [name for name in dir(client) if not name.startswith("_")]
        return {name: list(inspect.signature(getattr(client, name)).parameters) for name in public}

    assert methods(Client) == methods(AsyncClient)


def every_error(kind: type[MeiqaError] = MeiqaError) -> list[type[MeiqaError]]:
    return [kind, *(below for each in kind.__subclasses__() for below in every_error(each))]


@pytest.mark.parametrize("kind", [each for each in every_error() if hasattr(errors, each.__name__)])
def test_every_error_survives_the_way(kind: type[MeiqaError]) -> None:
    error = kind("what happened", seen="this", allowed="that", hint="do so")

    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(status_of(error), json=problem_of(error, "id"))

    with pytest.raises(kind) as again:
        ask_blocking(answer, "model", client={"retries": Retries(most=0)})
    assert type(again.value) is kind
    assert str(again.value) == str(error)
    assert again.value.retryable == error.retryable


def test_errors_have_statuses() -> None:
    kinds = (KeyRequired, AccessDenied, ImageTooLarge, DecodeError, UsageError, StoreLocked)
    assert [status_of(kind("x")) for kind in kinds] == [401, 403, 413, 422, 422, 503]
