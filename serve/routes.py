"""Routes that judge photos, tend the memory, and tell how the service is."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Coroutine, Iterable
from contextlib import suppress
from dataclasses import dataclass, fields
from itertools import islice
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.exceptions import HTTPException
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import StringConstraints

import meiqa
from meiqa.engine.anchoring import ANCHOR_STD, AnchorOptions, anchor_case
from meiqa.engine.asking import Question
from meiqa.engine.engine import Engine
from meiqa.engine.images import NamedBytes, load_pixels
from meiqa.errors import UsageError
from meiqa.memory import Record
from meiqa.memory.cases import Entry
from meiqa.serve import responses
from meiqa.serve.access import Scope, Settings, authorise
from meiqa.serve.middleware import Metrics
from meiqa.serve.responses import json_response, problems
from meiqa.serve.scheduler import Scheduler
from meiqa.serve.uploads import UploadLimiter, form_body, photo_body, read_form, read_photo
from meiqa.types import Budget, PairComparison, RememberedCase

T = TypeVar("T")
MOST_NEIGHBOURS = 256
GONE = 499
"""A status for the log only: nobody reads the answer."""
REFERENCE = {"reference": range(2)}
SECOND = {"second": range(Settings.max_photos + 1)}
MOST_CHARACTERS = 2048
"""Of the options of one request, for all questions and pairs: each may be a row for the model."""
Text = Annotated[str, StringConstraints(min_length=1, max_length=500)]
PAIR = {"first": range(1, 2), "second": range(1, 2)}

judging = APIRouter(tags=["judging"], responses=problems(401, 403))
memory = APIRouter(prefix="/v1/memory/cases", tags=["memory"], responses=problems(401, 403))
watching = APIRouter(tags=["watching"])
_bearer = HTTPBearer(
    auto_error=False, description="A key made by `meiqa api-key`, where the service has keys."
)
Key = Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]


@dataclass(frozen=True, eq=False)
class Service:
    """What routes work with; it is `app.state.service`."""

    scheduler: Scheduler
    settings: Settings
    metrics: Metrics
    uploads: UploadLimiter


def _authorise(request: Request, given: Key, scope: Scope | None = None) -> Service:
    """Check the caller's key, and note whose it is."""
    service: Service = request.app.state.service
    token = None if given is None else given.credentials
    key = authorise(service.settings.keys, token, scope)
    request.state.key = key and key.name
    return service


def _service_for(scope: Scope) -> Any:
    def authorised(request: Request, given: Key) -> Service:
        return _authorise(request, given, scope)

    return Depends(authorised)


Scoring = Annotated[Service, _service_for("score")]
Writing = Annotated[Service, _service_for("memory:write")]


def _budget_ms(
    request: Request,
    budget_ms: Annotated[
        float | None,
        Query(
            gt=0,
            allow_inf_nan=False,
            description="Milliseconds until the answer, waiting included, from when the photo is"
            " here. Left out: the service's usual budget.",
            examples=[500],
        ),
    ] = None,
) -> float | None:
    most_ms = request.app.state.service.settings.max_budget_ms
    if budget_ms is not None and budget_ms > most_ms:
        raise UsageError(
            "the budget is longer than this service allows",
            seen=f"{budget_ms:g} ms",
            allowed=f"at most {most_ms:g} ms",
        )
    return budget_ms


BudgetMs = Annotated[float | None, Depends(_budget_ms)]
Neighbours = Annotated[
    int | None,
    Query(ge=0, le=MOST_NEIGHBOURS, description="How many remembered photos to compare with."),
]


@judging.post(
    "/v1/score",
    response_model=responses.AssessmentBody,
    responses=problems(413, 422, 503),
    openapi_extra=photo_body(REFERENCE),
)
async def score(
    request: Request,
    given: Key,
    service: Scoring,
    budget_ms: BudgetMs,
    k: Neighbours = None,
    learn: Annotated[
        bool, Query(description="Remember what is learnt from it; takes the scope memory:write.")
    ] = False,
    embedding: Annotated[bool, Query(description="Give its embedding as well.")] = False,
) -> Response:
    """Assess a photo: the request's body, or the field `image` of a form.

    A form may also hold a `reference`: the photo as it should be, of the same shape.
    """
    if learn:
        _authorise(request, given, "memory:write")
    with service.uploads.holding() as hold:
        photo, beside = await read_photo(request, hold, service.settings, REFERENCE)
        reference = next(iter(beside), None)
        asked = service.scheduler.score(
            photo,
            budget_ms=budget_ms,
            k=k,
            learn=learn,
            embedding=embedding,
            reference=reference,
        )
        found = await _while_connected(request, asked)
    return json_response(found.to_dict())


@judging.post(
    "/v1/compare",
    response_model=PairComparison,
    responses=problems(413, 422, 503),
    openapi_extra=form_body(PAIR),
)
async def compare(request: Request, service: Scoring, budget_ms: BudgetMs) -> Response:
    """Compare two photos, both ways round; the budget is for all of it."""
    with service.uploads.holding() as hold:
        photos = await read_form(request, hold, service.settings, PAIR)
        (first,), (second,) = photos["first"], photos["second"]
        asked = service.scheduler.run(
            lambda engine, budget: engine.compare(first, second, budget=budget),
            budget_ms=budget_ms,
            photos=2,
        )
        found = await _while_connected(request, asked)
    return json_response(found.to_dict())


@judging.post(
    "/v1/rank",
    response_model=responses.RankingBody,
    responses=problems(413, 422, 503),
    openapi_extra=form_body({"images": range(1, Settings.max_photos + 1)}),
)
async def rank(
    request: Request, service: Scoring, budget_ms: BudgetMs, k: Neighbours = None
) -> Response:
    """Order photos, best first; the budget is for all of them together, pairs included."""
    with service.uploads.holding() as hold:
        fields = {"images": range(1, service.settings.max_photos + 1)}
        photos = await read_form(request, hold, service.settings, fields)
        named = distinctly_named(photos["images"])
        asked = service.scheduler.run(
            lambda engine, budget: engine.rank(named, budget=budget, k=k),
            budget_ms=budget_ms,
            photos=len(named),
        )
        found = await _while_connected(request, asked)
    return json_response(found.to_dict())


@judging.post(
    "/v1/options",
    response_model=responses.AnswersBody,
    responses=problems(413, 422, 503),
    openapi_extra=photo_body(SECOND),
)
async def options(
    request: Request,
    service: Scoring,
    budget_ms: BudgetMs,
    question: Annotated[list[Text], Query(description="What is asked; several may be.")],
    option: Annotated[list[Text], Query(description="How the reply may go on, each in turn.")],
    reply: Annotated[str, Query(max_length=500, description="How the reply begins.")] = "",
) -> Response:
    """Tell how probable each option is as the reply to questions about a photo.

    The photo is the request's body, or the field `image` of a form. With photos in `second`, each
    question is asked of each pair.
    """
    with service.uploads.holding() as hold:
        limits = {"second": range(service.settings.max_photos + 1)}
        photo, beside = await read_photo(request, hold, service.settings, limits)
        count = len(question) * max(1, len(beside)) * sum(map(len, option))
        if count > MOST_CHARACTERS:
            raise UsageError(
                "the options are too many for one request",
                seen=f"{count} characters, for all questions and pairs together",
                allowed=f"at most {MOST_CHARACTERS}",
            )
        seconds: list[NamedBytes | None] = [*distinctly_named(beside)] or [None]
        questions = [Question(text, option, each, reply) for text in question for each in seconds]
        asked = service.scheduler.run(
            lambda engine, _: engine.options_many(photo, questions),
            budget_ms=budget_ms,
            photos=1 + len(beside),
        )
        found = await _while_connected(request, asked)
    return json_response({"answers": [answer.to_dict() for answer in found]})


@judging.get("/v1/model", response_model=responses.ModelBody)
async def model(service: Scoring) -> Response:
    """Name the model, its memory and the service's limits."""
    engine, settings = service.scheduler.engines[0], service.settings
    manifest, snapshot = engine.package.manifest, engine.memory.snapshot()
    return json_response(
        {
            "version": meiqa.__version__,
            "architecture": manifest.architecture,
            "digest": engine.package.digest,
            "precision": manifest.precision,
            "prompt": manifest.prompt.name,
            "neighbours": manifest.calibration.neighbours,
            "max_pixels": manifest.image.max_pixels,
            "memory": {"anchors": snapshot.count_anchors, "contrast": snapshot.count_contrast},
            "limits": {
                "budget_ms": settings.budget_ms,
                "max_budget_ms": settings.max_budget_ms,
                "max_upload_bytes": settings.max_upload_bytes,
                "max_photos": settings.max_photos,
            },
        }
    )


@memory.get("", response_model=responses.CasesBody, responses=problems(422, 503))
async def list_cases(
    service: Scoring,
    origin: Annotated[Literal["anchor", "contrast"] | None, Query()] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    offset: Annotated[int, Query(ge=0, le=1 << 40)] = 0,
) -> Response:
    """List remembered photos, anchors first, each origin by id."""
    bank = service.scheduler.engines[0].memory

    def page() -> dict[str, Any]:
        snapshot = bank.snapshot()
        counts = {"anchor": snapshot.count_anchors, "contrast": snapshot.count_contrast}
        total = sum(counts.values()) if origin is None else counts[origin]
        cases = [_case(record) for record in islice(bank.cases(origin), offset, offset + limit)]
        following = offset + limit if offset + limit < total else None
        return {"cases": cases, "total": total, "next": following}

    return json_response(await asyncio.to_thread(page))


@memory.get("/chosen", response_model=responses.ChosenCasesBody, responses=problems(422, 503))
async def chosen_cases(
    service: Scoring,
    id: Annotated[list[str], Query(min_length=1, max_length=MOST_NEIGHBOURS, description="Which.")],
) -> Response:
    """Give some remembered photos, each with its thumbnail where one is kept."""
    bank = service.scheduler.engines[0].memory

    def chosen() -> list[dict[str, Any]]:
        views = bank.snapshot().views.values()
        found = (view.entry(each) for each in dict.fromkeys(id) for view in views)
        return [_with_thumbnail(entry) for entry in found if entry is not None]

    return json_response({"cases": await asyncio.to_thread(chosen)})


@memory.post(
    "",
    status_code=201,
    response_model=RememberedCase,
    responses=problems(409, 413, 422, 503),
    openapi_extra=photo_body(),
)
async def add_case(
    request: Request,
    service: Writing,
    id: Annotated[str, Query(min_length=1, max_length=255, description="What it is called.")],
    score: Annotated[float, Query(ge=1, le=5, description="What people gave it.")],
    std: Annotated[float, Query(gt=0, le=5, description="Standard error of it.")] = ANCHOR_STD,
    provenance: Annotated[str, Query(max_length=255)] = "added over HTTP",
) -> Response:
    """Remember a photo as an anchor; it takes part in the next assessment."""
    _require_text(id, provenance)

    def add(engine: Engine, _: Budget) -> dict[str, Any]:
        bank, pixels = engine.memory, load_pixels(photo)
        options = AnchorOptions(std=std, key_kind=bank.key_kind)
        bank.add_anchor(
            anchor_case(engine.model, pixels, id, score, options), provenance=provenance
        )
        return next(_case(record) for record in bank.cases("anchor") if record.id == id)

    with service.uploads.holding() as hold:
        photo, _ = await read_photo(request, hold, service.settings)
        added = await service.scheduler.run(add, budget_ms=service.settings.max_budget_ms)
    return json_response(added, 201)


@memory.delete("", response_model=responses.RemovedBody, responses=problems(409, 422, 503))
async def remove_cases(
    service: Writing,
    id: Annotated[list[str], Query(min_length=1, max_length=1000, description="Which.")],
) -> Response:
    """Remove cases by their ids, for good."""
    _require_text(*id)
    bank = service.scheduler.engines[0].memory
    return json_response({"removed": await asyncio.to_thread(bank.remove, id)})


def _with_thumbnail(entry: Entry) -> dict[str, Any]:
    jpeg = entry.thumbnail
    return {**_case(entry.record), "thumbnail": jpeg and base64.b64encode(jpeg).decode("ascii")}


def _case(record: Record) -> dict[str, Any]:
    return {field.name: getattr(record, field.name) for field in fields(RememberedCase)}


def _require_text(*texts: str) -> None:
    """Refuse what no file of a memory could be written with."""
    for text in texts:
        if not text.isprintable():
            raise UsageError("ids and provenances are printable text", seen=ascii(text)[:64])


def distinctly_named(photos: Iterable[NamedBytes]) -> list[NamedBytes]:
    """Number photos of one name, so that results can be told apart."""
    seen: dict[str, int] = {}
    named = []
    for photo in photos:
        count = seen[photo.name] = seen.get(photo.name, 0) + 1
        named.append(photo if count == 1 else NamedBytes(photo, f"{photo.name} ({count})"))
    return named


async def _while_connected(request: Request, asked: Coroutine[Any, Any, T]) -> T:
    """Await an answer, and take the question back when its asker goes away."""
    answer = asyncio.ensure_future(asked)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((answer, gone), return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise HTTPException(GONE, "the client went away")
        return answer.result()
    finally:
        for task in (answer, gone):
            if not task.done():
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


@watching.get("/healthz", response_model=responses.HealthBody)
async def health() -> Response:
    """Answer as long as the process lives."""
    return json_response({"status": "ok"})


@watching.get(
    "/readyz",
    response_model=responses.HealthBody,
    responses={503: {"model": responses.HealthBody, "description": "It is starting or ending."}},
)
async def readiness(request: Request) -> Response:
    """Tell a load balancer whether to send photos."""
    ready = request.app.state.service.scheduler.ready
    return json_response({"status": "ready" if ready else "not ready"}, 200 if ready else 503)


@watching.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {}}}, **problems(401)},
)
async def metrics(request: Request, given: Key) -> Response:
    """Give the counters in Prometheus' text format."""
    return Response(_authorise(request, given).metrics.text(), media_type=CONTENT_TYPE_LATEST)


router = APIRouter()
for each in (judging, memory, watching):
    router.include_router(each)
