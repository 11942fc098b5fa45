"""The client gives what the engine gives, and raises what the engine raises."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from fastapi.testclient import TestClient

from meiqa import errors
from meiqa.client import AsyncClient, Client, Retries
from meiqa.engine.pipeline import Engine
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
from meiqa.serve.app import create_app
from meiqa.serve.problems import error_from, problem_of, status_of
from meiqa.serve.settings import Settings
from meiqa.types import Assessment, Budget, Failure
from tests.serve.conftest import jpeg

Answer = Callable[[httpx.Request], httpx.Response]


class _ToApp(httpx.BaseTransport):
    """Hands requests to a service in this process."""

    def __init__(self, api: TestClient) -> None:
        self._api = api

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        answer = self._api.request(
            request.method,
            str(request.url),
            content=request.read(),
            headers=dict(request.headers.items()),
        )
        return httpx.Response(
            answer.status_code, headers=dict(answer.headers), content=answer.content
        )


@pytest.fixture
def client(api: TestClient) -> Iterator[Client]:
    """Give a client of a service in this process."""
    with Client("http://localhost", transport=_ToApp(api)) as client:
        yield client


def test_a_score_comes_back_as_an_assessment(
    client: Client, engine: Engine, tmp_path: Path
) -> None:
    file = tmp_path / "one.jpg"
    file.write_bytes(jpeg(1))
    found = client.score(file, budget_ms=30_000, k=4)
    alone = engine.score(file, budget=Budget(ms=1e6), k=4, learn=False)
    assert isinstance(found, Assessment)
    assert found.path == "one.jpg"
    assert found.score == pytest.approx(alone.score, abs=1e-3)
    assert [each.id for each in found.neighbours] == [each.id for each in alone.neighbours]
    assert math.isnan(found.neighbours[0].std)  # it is not sent
    assert isinstance(found.ci95, tuple)
    assert found.to_dict().keys() == alone.to_dict().keys()


def test_everything_else_comes_back_typed(client: Client) -> None:
    pair = client.compare(jpeg(1), jpeg(2))
    assert 0 <= pair.preference <= 1
    ranking = client.rank([jpeg(1), jpeg(2), b"broken"], k=2)
    assert [photo.rank for photo in ranking.photos] == [1, 2]
    assert isinstance(ranking.failures[0], Failure)
    assert len(list(client.cases())) == 24
    assert next(client.cases("anchor")).id == "anchor-00"
    assert client.model()["memory"]["anchors"] == 24
    kinds = [type(each) for each in client.score_many([jpeg(1), b"broken"], k=2)]
    assert kinds == [Assessment, Failure]


def test_errors_are_the_librarys_own(client: Client) -> None:
    with pytest.raises(DecodeError, match="not an image") as refused:
        client.score(b"broken")
    assert "JPEG" in str(refused.value.allowed)
    with pytest.raises(UsageError, match="budget"):
        client.score(jpeg(1), budget_ms=1e9)
    with pytest.raises(AccessDenied, match="without keys"):
        client.add_case(jpeg(1), id="a", score=3)
    with pytest.raises(AccessDenied):
        client.remove_cases(["a"])
    with pytest.raises(DecodeError, match="cannot be read"):
        client.score("/no/such/photo.jpg")


def test_it_works_with_asyncio(engine: Engine) -> None:
    async def check() -> None:
        app = create_app(engine, Settings(budget_ms=30_000))
        transport = httpx.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            AsyncClient("http://localhost", transport=transport) as client,
        ):
            found = await asyncio.gather(*(client.score(jpeg(seed), k=2) for seed in range(4)))
            assert len({each.score for each in found}) == 4
            assert (await client.compare(jpeg(1), jpeg(1))).preference == pytest.approx(0.5)
            assert len((await client.rank([jpeg(1), jpeg(2)], k=2)).photos) == 2
            assert len([case async for case in client.cases()]) == 24
            assert (await client.model())["version"]
            with pytest.raises(DecodeError):
                await client.score(b"")
            with pytest.raises(AccessDenied):
                await client.remove_cases(["a"])
            with pytest.raises(AccessDenied):
                await client.add_case(jpeg(1), id="a", score=3)

    asyncio.run(check())


def busy(times: int, after: str, then: Answer) -> tuple[httpx.MockTransport, list[float]]:
    """A service that refuses so many times, and when it was asked."""
    asked: list[float] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(time.perf_counter())
        if len(asked) <= times:
            error = Overloaded("too busy")
            problem = problem_of(error, 503, "id")
            return httpx.Response(503, json=problem, headers={"Retry-After": after})
        return then(request)

    return httpx.MockTransport(answer), asked


def model(request: httpx.Request) -> httpx.Response:
    return httpx.Response(200, json={"version": "1"})


def test_it_asks_again_when_the_service_says() -> None:
    transport, asked = busy(1, "1", model)
    with Client(transport=transport) as client:
        assert client.model() == {"version": "1"}
    assert 0.9 < asked[1] - asked[0] < 2.0


def test_it_does_not_ask_for_ever() -> None:
    for retries, after, tries in ((Retries(most=2, longest_s=9), "0", 3), (Retries(), "60", 1)):
        transport, asked = busy(99, after, model)
        with Client(transport=transport, retries=retries) as client, pytest.raises(Overloaded):
            client.model()
        assert len(asked) == tries


def test_what_changes_something_is_not_repeated_on_a_broken_connection() -> None:
    asked = []

    def broken(request: httpx.Request) -> httpx.Response:
        asked.append(request.method)
        raise httpx.ReadError("gone")

    quick = Retries(most=1, first_s=0.0)
    with Client(transport=httpx.MockTransport(broken), retries=quick) as client:
        with pytest.raises(ServiceUnreachable, match="gone"):
            client.model()
        with pytest.raises(ServiceUnreachable):
            client.remove_cases(["a"])
    assert asked == ["GET", "GET", "DELETE"]


def test_the_key_is_sent_and_not_shown() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        given = request.headers["Authorization"] == "Bearer s3cret"
        return httpx.Response(200, json={"given": given})

    client = Client(api_key="s3cret", transport=httpx.MockTransport(answer))
    assert client.model() == {"given": True}
    assert "s3cret" not in repr(client)


@pytest.mark.parametrize("body", [b"<html>", b"[]", b"null", b'{"type": 3}', b""])
def test_whatever_answers_an_error_is_one(body: bytes) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(502, content=body)

    with Client(transport=httpx.MockTransport(answer)) as client, pytest.raises(ServiceError):
        client.model()


def test_a_timeout_is_an_error_of_ours() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        assert request.extensions["timeout"]["read"] == 65.0  # the budget, and some time beside
        raise httpx.ReadTimeout("slow")

    once = Retries(most=0)
    with (
        Client(transport=httpx.MockTransport(answer), retries=once) as client,
        pytest.raises(ServiceUnreachable),
    ):
        client.score(b"x", budget_ms=60_000)


def every_error(kind: type[MeiqaError] = MeiqaError) -> list[type[MeiqaError]]:
    return [kind, *(below for each in kind.__subclasses__() for below in every_error(each))]


@pytest.mark.parametrize("kind", [each for each in every_error() if hasattr(errors, each.__name__)])
def test_every_error_survives_the_way(kind: type[MeiqaError]) -> None:
    error = kind("what happened", seen="this", allowed="that", hint="do so")
    again = error_from(problem_of(error, status_of(error), "id"))
    assert type(again) is kind
    assert str(again) == str(error)
    assert again.retryable == error.retryable


def test_errors_have_statuses() -> None:
    kinds = (KeyRequired, AccessDenied, ImageTooLarge, DecodeError, UsageError, StoreLocked)
    assert [status_of(kind("x")) for kind in kinds] == [401, 403, 413, 422, 422, 503]
