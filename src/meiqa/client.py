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
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, is_dataclass
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, Self, TypeVar, get_args, get_type_hints

from meiqa import errors, types
from meiqa.errors import MeiqaError, ServiceError
from meiqa.types import Answer, Assessment, Failure, Origin, PairComparison, Ranking, RememberedCase

try:
    import httpx
except ModuleNotFoundError as missing:  # pragma: no cover - the tests have it
    raise ModuleNotFoundError(
        f"meiqa.client needs httpx: {errors.install_hint('serve')}", name=missing.name
    ) from missing

__all__ = ["AsyncClient", "Client", "RememberedCase", "Retries"]

T = TypeVar("T")
P = ParamSpec("P")
PhotoSource = str | Path | bytes
"""A path on this machine, or an encoded photo; what is sent are its bytes."""

_URL = "http://127.0.0.1:8000"
_CASES = "/v1/memory/cases"
_PAGE = 1000
_UNSENT: dict[Any, dict[str, Any]] = {types.Neighbour: {"std": math.nan}}
_GRACE_S = 5.0
"""How much longer than its budget an answer is awaited: it has to be sent, too."""


@dataclass(frozen=True)
class Retries:
    """When a refused or broken request is sent again."""

    most: int = 2  # after the first; 0 for never
    longest_s: float = 5.0  # who asks to be left alone for longer is left alone for good
    first_s: float = 0.2  # pause where the service names none; it doubles each time

    def pause_s(self, tried: int, error: MeiqaError) -> float | None:
        """Give the pause before the next try, None to give up."""
        if not error.retryable or tried >= self.most:
            return None
        asked_s = error.retry_after_s if isinstance(error, ServiceError) else None
        pause_s = self.first_s * 2**tried if asked_s is None else asked_s
        return pause_s if pause_s <= self.longest_s else None


class _Requests:
    """What a service can be asked, over httpx's asynchronous client or over its blocking one."""

    def __init__(
        self, http: httpx.AsyncClient | httpx.Client, timeout_s: float, retries: Retries
    ) -> None:
        self._http, self._timeout_s, self._retries = http, timeout_s, retries

    async def score(
        self,
        image: PhotoSource,
        *,
        reference: PhotoSource | None = None,
        budget_ms: float | None = None,
        k: int | None = None,
        learn: bool = False,
        embedding: bool = False,
    ) -> Assessment:
        """Assess a photo; see `Engine.score`. Learning takes a key with the scope memory:write.

        Raises:
            ImageError: it cannot be judged.
            Overloaded: the answer would come too late; asked again as `retries` says.
            AccessDenied, UploadTooLarge, UsageError: the service refuses the request.
            ServiceUnreachable: no answer came.
        """
        flags = {"learn": learn or None, "embedding": embedding or None}
        params = {"budget_ms": budget_ms, "k": k, **flags}
        photos = [("image", image), *([] if reference is None else [("reference", reference)])]
        # What is learnt twice is kept once, but the second answer would differ from the first.
        asked = self._ask(Assessment, "POST", "/v1/score", params, photos, repeatable=not learn)
        return await asked

    async def score_many(
        self, images: Iterable[PhotoSource], *, budget_ms: float | None = None, k: int | None = None
    ) -> AsyncIterator[Assessment | Failure]:
        """Assess photos one after the other; one that cannot be judged gives a Failure."""
        for image in images:
            try:
                yield await self.score(image, budget_ms=budget_ms, k=k)
            except MeiqaError as error:
                yield Failure("<bytes>" if isinstance(image, bytes) else str(image), error)

    async def compare(
        self, first: PhotoSource, second: PhotoSource, *, budget_ms: float | None = None
    ) -> PairComparison:
        """Tell which of two photos looks better; errors are those of `score`."""
        photos = [("first", first), ("second", second)]
        params = {"budget_ms": budget_ms}
        return await self._ask(PairComparison, "POST", "/v1/compare", params, photos)

    async def rank(
        self, images: Iterable[PhotoSource], *, budget_ms: float | None = None, k: int | None = None
    ) -> Ranking:
        """Order photos, best first; the budget is for all. Errors are those of `score`."""
        photos = [("images", image) for image in images]
        params = {"budget_ms": budget_ms, "k": k}
        return await self._ask(Ranking, "POST", "/v1/rank", params, photos)

    async def options(
        self,
        image: PhotoSource,
        questions: Sequence[str],
        options: Sequence[str],
        *,
        seconds: Iterable[PhotoSource] = (),
        reply: str = "",
        budget_ms: float | None = None,
    ) -> tuple[Answer, ...]:
        """Tell how probable options are as replies to questions; see `Question`.

        With second photos each question is asked of each pair, in their order. Errors are those of
        `score`.
        """
        params = {"question": list(questions), "option": list(options), "reply": reply or None}
        photos = [("image", image), *(("second", second) for second in seconds)]
        found = await self._ask(
            dict, "POST", "/v1/options", params | {"budget_ms": budget_ms}, photos
        )
        return tuple(_read(Answer, answer) for answer in found["answers"])

    async def cases(self, origin: Origin | None = None) -> AsyncIterator[RememberedCase]:
        """List what the service remembers, page by page."""
        offset: int | None = 0
        while offset is not None:
            params = {"origin": origin, "offset": offset, "limit": _PAGE}
            page = await self._ask(dict, "GET", _CASES, params)
            for case in page["cases"]:
                yield _read(RememberedCase, case)
            offset = page["next"]

    async def add_case(
        self,
        image: PhotoSource,
        *,
        id: str,
        score: float,
        std: float | None = None,
        provenance: str | None = None,
    ) -> RememberedCase:
        """Add a photo with its human score; takes a key with the scope memory:write."""
        params = {"id": id, "score": score, "std": std, "provenance": provenance}
        return await self._ask(RememberedCase, "POST", _CASES, params, [("image", image)])

    async def remove_cases(self, ids: Sequence[str]) -> int:
        """Remove cases for good, and give how many; takes the scope memory:write."""
        found = await self._ask(dict, "DELETE", _CASES, {"id": list(ids)}, repeatable=False)
        return int(found["removed"])

    async def model(self) -> dict[str, Any]:
        """Give the names of what judges, and the service's limits."""
        return await self._ask(dict, "GET", "/v1/model", {})

    async def _ask(
        self,
        kind: type[T],
        method: str,
        path: str,
        params: dict[str, Any],
        photos: Iterable[tuple[str, PhotoSource]] = (),
        *,
        repeatable: bool = True,
    ) -> T:
        """Send a request, as often as need be, and read what is answered."""
        given = {name: value for name, value in params.items() if value is not None}
        budget_s = given.get("budget_ms", 0.0) / 1e3 + _GRACE_S
        timeout = httpx.Timeout(self._timeout_s, read=max(self._timeout_s, budget_s))
        files = [(field, _file(image)) for field, image in photos] or None
        tried = 0
        while True:
            try:
                answer = self._http.request(
                    method, path, params=given, files=files, timeout=timeout
                )
                value = _value(answer if isinstance(answer, httpx.Response) else await answer)
                found: T = _read(kind, value)
                return found
            except httpx.HTTPError as broken:
                reason = str(broken) or type(broken).__name__
                error: MeiqaError = errors.ServiceUnreachable(
                    f"no answer from {self._http.base_url}: {reason}",
                    hint="is meiqa serve running?",
                )
                error.__cause__ = broken
            except MeiqaError as refused:
                error = refused
            # A refusal did nothing; of a broken connection one does not know.
            safe = repeatable or isinstance(error, errors.Overloaded)
            pause_s = self._retries.pause_s(tried, error) if safe else None
            if pause_s is None:
                raise error
            if isinstance(self._http, httpx.Client):
                time.sleep(pause_s)
            else:
                await asyncio.sleep(pause_s)
            tried += 1


class AsyncClient(_Requests):
    """A service, asked from asyncio; an async context manager.

    Args:
        url: where it is.
        api_key: made by `meiqa api-key`, where it asks for one.
        timeout_s: for connecting, sending, and an answer without a budget.
        retries: when to ask again.
        transport: httpx's, for tests.
    """

    def __init__(
        self,
        url: str = _URL,
        *,
        api_key: str | None = None,
        timeout_s: float = 30.0,
        retries: Retries = Retries(),
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        http = httpx.AsyncClient(base_url=url, headers=headers, transport=transport)
        super().__init__(http, timeout_s, retries)
        self.aclose = http.aclose

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


# The blocking client is derived from the same requests. Over httpx's blocking client their
# coroutines run to the end without ever being suspended, and need no event loop.


def _finished(coroutine: Awaitable[T]) -> T:
    try:
        coroutine.__await__().send(None)
    except StopIteration as done:
        value: T = done.value
        return value
    raise AssertionError("a blocking client is never suspended")


def _blocking(
    method: Callable[Concatenate[_Requests, P], Awaitable[T]],
) -> Callable[Concatenate[Client, P], T]:
    @wraps(method)
    def call(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return _finished(method(self._requests, *args, **kwargs))

    return call


def _blocking_iterator(
    method: Callable[Concatenate[_Requests, P], AsyncIterator[T]],
) -> Callable[Concatenate[Client, P], Iterator[T]]:
    @wraps(method)
    def call(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
        items = method(self._requests, *args, **kwargs)
        while True:
            try:
                item = _finished(anext(items))
            except StopAsyncIteration:
                return
            yield item

    return call


class Client:
    """A service, asked from a thread; a context manager. Arguments are those of `AsyncClient`."""

    def __init__(
        self,
        url: str = _URL,
        *,
        api_key: str | None = None,
        timeout_s: float = 30.0,
        retries: Retries = Retries(),
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        http = httpx.Client(base_url=url, headers=headers, transport=transport)
        self._requests = _Requests(http, timeout_s, retries)
        self.close = http.close

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    score = _blocking(_Requests.score)
    score_many = _blocking_iterator(_Requests.score_many)
    compare = _blocking(_Requests.compare)
    rank = _blocking(_Requests.rank)
    options = _blocking(_Requests.options)
    cases = _blocking_iterator(_Requests.cases)
    add_case = _blocking(_Requests.add_case)
    remove_cases = _blocking(_Requests.remove_cases)
    model = _blocking(_Requests.model)


def _file(image: PhotoSource) -> tuple[str, bytes]:
    """Read a photo on this machine; the service is sent its bytes and the last part of its name."""
    if isinstance(image, bytes):
        return "image", image
    try:
        return Path(image).name, Path(image).read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise errors.DecodeError(
            f"{image} cannot be read: {reason}", hint="check the path"
        ) from None


def _value(answer: httpx.Response) -> Any:
    """Read an answer's JSON, or raise what its problem says."""
    try:
        value = answer.json()
    except ValueError:
        value = None
    if answer.is_success and value is not None:
        return value
    problem = value if isinstance(value, dict) else {}
    error = _error_of({"detail": f"the service answered {answer.status_code}", **problem})
    after = answer.headers.get("Retry-After", "")
    if isinstance(error, ServiceError) and error.retry_after_s is None and after.isdecimal():
        error.retry_after_s = float(after)
    raise error


def _error_of(problem: dict[str, Any]) -> MeiqaError:
    """Make the library's error of problem details, whatever else answers with them."""
    words = str(problem.get("type", "")).removeprefix("urn:meiqa:problem:").split("-")
    kind = getattr(errors, "".join(map(str.capitalize, words)), ServiceError)
    if not (isinstance(kind, type) and issubclass(kind, MeiqaError)):
        kind = ServiceError
    what = problem.get("what") or problem.get("detail") or problem.get("title") or "no reason given"
    error = kind(str(what), **{name: problem.get(name) for name in ("seen", "allowed", "hint")})
    after_ms = problem.get("retry_after_ms")
    if isinstance(error, ServiceError) and isinstance(after_ms, int | float):
        error.retry_after_s = after_ms / 1e3
    return error


def _read(kind: Any, found: Any) -> Any:
    """Make a result of JSON, as its annotations say; what they don't know is passed over."""
    if found is None:
        return math.nan if kind is float else None
    if kind is Failure:
        what, hint = str(found["error"]), found["hint"]
        return Failure(found["path"], errors.ImageError(what.removesuffix(f"; {hint}"), hint=hint))
    made: Any = kind
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        known = {name: _read(hints[name], value) for name, value in found.items() if name in hints}
        return made(**_UNSENT.get(kind, {}) | known)
    inner = next((each for each in get_args(kind) if is_dataclass(each)), None)
    if isinstance(found, list):
        return tuple(_read(inner, each) for each in found)
    return found if inner is None else _read(inner, found)
