"""A client of `meiqa serve`, for threads and for asyncio.

It raises the library's own errors, so code that works with an `Engine` works with a service:

>>> from meiqa.client import Client
>>> with Client("http://127.0.0.1:8000") as client:  # doctest: +SKIP
...     client.score("photo.jpg", budget_ms=500).score
3.41
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Self

try:
    import httpx
except ModuleNotFoundError as missing:  # pragma: no cover - the tests have it
    raise ModuleNotFoundError(
        "meiqa.client needs httpx: pip install 'meiqa[serve]'", name=missing.name
    ) from missing

from meiqa.errors import (
    DecodeError,
    ImageError,
    MeiqaError,
    Overloaded,
    ServiceError,
    ServiceUnreachable,
)
from meiqa.serve.problems import error_from
from meiqa.types import (
    Assessment,
    Distortion,
    Failure,
    Neighbour,
    Origin,
    PairComparison,
    RankedPhoto,
    Ranking,
    Reference,
)

__all__ = ["AsyncClient", "Client", "RememberedCase", "Retries"]

PhotoSource = str | Path | bytes
"""A path on this machine, or an encoded photo; what is sent are its bytes."""

_PAGE = 1000
_GRACE_S = 5.0
"""How much longer than its budget an answer is awaited: it has to be sent, too."""


@dataclass(frozen=True)
class Retries:
    """When a refused or broken request is sent again.

    Attributes:
        most: times at most, after the first; 0 for never.
        longest_s: a service that asks to be left alone for longer is left alone for good.
        first_s: pause where the service names none; it doubles each time.
    """

    most: int = 2
    longest_s: float = 5.0
    first_s: float = 0.2

    def pause_s(self, tried: int, error: MeiqaError) -> float | None:
        """Give the pause before the next try, None to give up."""
        if not error.retryable or tried >= self.most:
            return None
        asked_s = error.retry_after_s if isinstance(error, ServiceError) else None
        pause_s = self.first_s * 2**tried if asked_s is None else asked_s
        return pause_s if pause_s <= self.longest_s else None


@dataclass(frozen=True)
class RememberedCase:
    """A photo in the service's memory; `created` is in seconds since 1970."""

    id: str
    origin: Origin
    score: float
    std: float
    summary: str
    provenance: str
    created: float


@dataclass(frozen=True)
class _Call:
    """A request, and how to read its answer."""

    method: str
    path: str
    read: Callable[[Any], Any]
    params: Mapping[str, Any]
    photos: tuple[tuple[str, str, bytes], ...] = ()
    repeatable: bool = True

    def arguments(self, timeout_s: float) -> dict[str, Any]:
        """Give the arguments of httpx's `request`."""
        budget_ms = self.params.get("budget_ms")
        longest_s = timeout_s if budget_ms is None else budget_ms / 1e3 + _GRACE_S
        files = [(field, (name, data)) for field, name, data in self.photos]
        return {
            "method": self.method,
            "url": self.path,
            "params": {name: value for name, value in self.params.items() if value is not None},
            "files": files or None,
            "timeout": httpx.Timeout(timeout_s, read=max(timeout_s, longest_s)),
        }


class _Calls:
    """What both clients can ask."""

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        *,
        api_key: str | None = None,
        timeout_s: float = 30.0,
        retries: Retries = Retries(),
    ) -> None:
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._url = url
        self._timeout_s = timeout_s
        self._retries = retries

    @staticmethod
    def _score(
        image: PhotoSource,
        reference: PhotoSource | None,
        budget_ms: float | None,
        k: int | None,
        learn: bool,
    ) -> _Call:
        params = {"budget_ms": budget_ms, "k": k, "learn": learn or None}
        # What is learnt twice is kept once, but the second answer would differ from the first.
        beside = () if reference is None else (_photo("reference", reference),)
        photos = (_photo("image", image), *beside)
        return _Call("POST", "/v1/score", _assessment, params, photos, repeatable=not learn)

    @staticmethod
    def _compare(first: PhotoSource, second: PhotoSource, budget_ms: float | None) -> _Call:
        photos = (_photo("first", first), _photo("second", second))
        return _Call("POST", "/v1/compare", _comparison, {"budget_ms": budget_ms}, photos)

    @staticmethod
    def _rank(images: Iterable[PhotoSource], budget_ms: float | None, k: int | None) -> _Call:
        photos = tuple(_photo("images", image) for image in images)
        return _Call("POST", "/v1/rank", _ranking, {"budget_ms": budget_ms, "k": k}, photos)

    @staticmethod
    def _cases(origin: Origin | None, offset: int) -> _Call:
        params = {"origin": origin, "offset": offset, "limit": _PAGE}
        return _Call("GET", "/v1/memory/cases", _page, params)

    @staticmethod
    def _add(
        image: PhotoSource, id: str, score: float, std: float | None, provenance: str | None
    ) -> _Call:
        params = {"id": id, "score": score, "std": std, "provenance": provenance}
        photos = (_photo("image", image),)
        return _Call("POST", "/v1/memory/cases", _case, params, photos)

    @staticmethod
    def _remove(ids: Sequence[str]) -> _Call:
        params = {"id": list(ids)}
        return _Call(
            "DELETE", "/v1/memory/cases", lambda found: int(found["removed"]), params, (), False
        )

    @staticmethod
    def _model() -> _Call:
        return _Call("GET", "/v1/model", dict, {})

    def _pause_s(self, call: _Call, tried: int, error: MeiqaError) -> float | None:
        # A refusal did nothing; of a broken connection one does not know.
        safe = call.repeatable or isinstance(error, Overloaded)
        return self._retries.pause_s(tried, error) if safe else None


class Client(_Calls):
    """A service, asked from a thread; a context manager.

    Args:
        url: where it is.
        api_key: made by `meiqa api-key`, where it asks for one.
        timeout_s: for connecting, sending, and an answer without a budget.
        retries: when to ask again.
        transport: httpx's, for tests.
    """

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        *,
        api_key: str | None = None,
        timeout_s: float = 30.0,
        retries: Retries = Retries(),
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        super().__init__(url, api_key=api_key, timeout_s=timeout_s, retries=retries)
        self._http = httpx.Client(base_url=url, headers=self._headers, transport=transport)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the connections."""
        self._http.close()

    def score(
        self,
        image: PhotoSource,
        *,
        reference: PhotoSource | None = None,
        budget_ms: float | None = None,
        k: int | None = None,
        learn: bool = False,
    ) -> Assessment:
        """Assess a photo; see `Engine.score`. Learning takes a key with the scope memory:write.

        Raises:
            ImageError: it cannot be judged.
            Overloaded: the answer would come too late; asked again as `retries` says.
            AccessDenied, UploadTooLarge, UsageError: the service refuses the request.
            ServiceUnreachable: no answer came.
        """
        found: Assessment = self._ask(self._score(image, reference, budget_ms, k, learn))
        return found

    def score_many(
        self,
        images: Iterable[PhotoSource],
        *,
        budget_ms: float | None = None,
        k: int | None = None,
    ) -> Iterator[Assessment | Failure]:
        """Assess photos one after the other; one that cannot be judged gives a Failure."""
        for image in images:
            try:
                yield self.score(image, budget_ms=budget_ms, k=k)
            except MeiqaError as error:
                yield Failure(_name(image), error)

    def compare(
        self, first: PhotoSource, second: PhotoSource, *, budget_ms: float | None = None
    ) -> PairComparison:
        """Tell which of two photos looks better; errors are those of `score`."""
        found: PairComparison = self._ask(self._compare(first, second, budget_ms))
        return found

    def rank(
        self,
        images: Iterable[PhotoSource],
        *,
        budget_ms: float | None = None,
        k: int | None = None,
    ) -> Ranking:
        """Order photos, best first; the budget is for all. Errors are those of `score`."""
        found: Ranking = self._ask(self._rank(images, budget_ms, k))
        return found

    def cases(self, origin: Origin | None = None) -> Iterator[RememberedCase]:
        """List what the service remembers, page by page."""
        offset: int | None = 0
        while offset is not None:
            cases, offset = self._ask(self._cases(origin, offset))
            yield from cases

    def add_case(
        self,
        image: PhotoSource,
        *,
        id: str,
        score: float,
        std: float | None = None,
        provenance: str | None = None,
    ) -> RememberedCase:
        """Add a photo with its human score; takes a key with the scope memory:write."""
        found: RememberedCase = self._ask(self._add(image, id, score, std, provenance))
        return found

    def remove_cases(self, ids: Sequence[str]) -> int:
        """Remove cases for good, and give how many; takes the scope memory:write."""
        found: int = self._ask(self._remove(ids))
        return found

    def model(self) -> dict[str, Any]:
        """Give the names of what judges, and the service's limits."""
        found: dict[str, Any] = self._ask(self._model())
        return found

    def _ask(self, call: _Call) -> Any:
        for tried in range(self._retries.most + 1):
            try:
                answer = self._http.request(**call.arguments(self._timeout_s))
                return call.read(_value(answer))
            except (httpx.HTTPError, MeiqaError) as error:
                ours = _ours(error, self._url)
                pause_s = self._pause_s(call, tried, ours)
                if pause_s is None:
                    raise ours from (None if ours is error else error)
            time.sleep(pause_s)
        raise AssertionError("the last try returns or raises")


class AsyncClient(_Calls):
    """A service, asked from asyncio; an async context manager. Arguments are those of `Client`."""

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        *,
        api_key: str | None = None,
        timeout_s: float = 30.0,
        retries: Retries = Retries(),
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        super().__init__(url, api_key=api_key, timeout_s=timeout_s, retries=retries)
        self._http = httpx.AsyncClient(base_url=url, headers=self._headers, transport=transport)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Let go of the connections."""
        await self._http.aclose()

    async def score(
        self,
        image: PhotoSource,
        *,
        reference: PhotoSource | None = None,
        budget_ms: float | None = None,
        k: int | None = None,
        learn: bool = False,
    ) -> Assessment:
        """Assess a photo; see `Client.score`."""
        found: Assessment = await self._ask(self._score(image, reference, budget_ms, k, learn))
        return found

    async def compare(
        self, first: PhotoSource, second: PhotoSource, *, budget_ms: float | None = None
    ) -> PairComparison:
        """Tell which of two photos looks better; see `Client.compare`."""
        found: PairComparison = await self._ask(self._compare(first, second, budget_ms))
        return found

    async def rank(
        self,
        images: Iterable[PhotoSource],
        *,
        budget_ms: float | None = None,
        k: int | None = None,
    ) -> Ranking:
        """Order photos, best first; see `Client.rank`."""
        found: Ranking = await self._ask(self._rank(images, budget_ms, k))
        return found

    async def cases(self, origin: Origin | None = None) -> AsyncIterator[RememberedCase]:
        """List what the service remembers, page by page."""
        offset: int | None = 0
        while offset is not None:
            cases, offset = await self._ask(self._cases(origin, offset))
            for case in cases:
                yield case

    async def add_case(
        self,
        image: PhotoSource,
        *,
        id: str,
        score: float,
        std: float | None = None,
        provenance: str | None = None,
    ) -> RememberedCase:
        """Add a photo with its human score; see `Client.add_case`."""
        found: RememberedCase = await self._ask(self._add(image, id, score, std, provenance))
        return found

    async def remove_cases(self, ids: Sequence[str]) -> int:
        """Remove cases for good, and give how many; see `Client.remove_cases`."""
        found: int = await self._ask(self._remove(ids))
        return found

    async def model(self) -> dict[str, Any]:
        """Give the names of what judges, and the service's limits."""
        found: dict[str, Any] = await self._ask(self._model())
        return found

    async def _ask(self, call: _Call) -> Any:
        for tried in range(self._retries.most + 1):
            try:
                answer = await self._http.request(**call.arguments(self._timeout_s))
                return call.read(_value(answer))
            except (httpx.HTTPError, MeiqaError) as error:
                ours = _ours(error, self._url)
                pause_s = self._pause_s(call, tried, ours)
                if pause_s is None:
                    raise ours from (None if ours is error else error)
            await asyncio.sleep(pause_s)
        raise AssertionError("the last try returns or raises")


def _ours(error: httpx.HTTPError | MeiqaError, url: str) -> MeiqaError:
    if isinstance(error, MeiqaError):
        return error
    reason = str(error) or type(error).__name__
    return ServiceUnreachable(f"no answer from {url}: {reason}", hint="is meiqa serve running?")


def _value(answer: httpx.Response) -> Any:
    """Read an answer's JSON, or raise what its problem says."""
    try:
        value = answer.json()
    except ValueError:
        value = None
    if answer.is_success and value is not None:
        return value
    problem = value if isinstance(value, dict) else {}
    error = error_from({"detail": f"the service answered {answer.status_code}", **problem})
    if isinstance(error, ServiceError) and error.retry_after_s is None:
        after = answer.headers.get("Retry-After", "")
        error.retry_after_s = float(after) if after.isascii() and after.isdigit() else None
    raise error


def _photo(field: str, image: PhotoSource) -> tuple[str, str, bytes]:
    """Read a photo on this machine; the service is sent its bytes and the last part of its name."""
    if isinstance(image, bytes):
        return field, "image", image
    try:
        return field, Path(image).name, Path(image).read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DecodeError(f"{image} cannot be read: {reason}", hint="check the path") from None


def _name(image: PhotoSource) -> str:
    return "<bytes>" if isinstance(image, bytes) else str(image)


def _assessment(found: Mapping[str, Any]) -> Assessment:
    """Read an assessment; what a newer service tells beside is passed over."""
    known = {field.name: found[field.name] for field in fields(Assessment) if field.name in found}
    tuples = {name: tuple(known[name]) for name in ("ci95", "degraded")}
    if reference := known.get("reference"):
        known["reference"] = Reference(**reference)
    if distortions := known.get("distortions"):
        known["distortions"] = tuple(Distortion(**each) for each in distortions)
    neighbours = tuple(Neighbour(**{"std": math.nan, **each}) for each in found["neighbours"])
    percentile = math.nan if found["percentile"] is None else found["percentile"]
    return Assessment(**{**known, **tuples, "neighbours": neighbours, "percentile": percentile})


def _comparison(found: Mapping[str, Any]) -> PairComparison:
    return PairComparison(**found)


def _ranking(found: Mapping[str, Any]) -> Ranking:
    return Ranking(
        tuple(RankedPhoto(**each) for each in found["photos"]),
        tuple(Failure(each["path"], _told(each)) for each in found["failures"]),
    )


def _told(failure: Mapping[str, Any]) -> MeiqaError:
    hint = failure["hint"]
    return ImageError(str(failure["error"]).removesuffix(f"; {hint}"), hint=hint)


def _page(found: Mapping[str, Any]) -> tuple[list[RememberedCase], int | None]:
    return [_case(each) for each in found["cases"]], found["next"]


def _case(found: Mapping[str, Any]) -> RememberedCase:
    return RememberedCase(**found)
