"""Routes that judge photos and tend the memory."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from contextlib import suppress
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.exceptions import HTTPException
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

import meiqa
from meiqa.engine.anchoring import ANCHOR_STD, anchor_case
from meiqa.engine.images import NamedBytes, load_pixels
from meiqa.engine.local import LocalVlm
from meiqa.engine.pipeline import Engine
from meiqa.errors import AccessDenied, UsageError
from meiqa.serve.access import Key, Keys, Scope
from meiqa.serve.answers import json_answer
from meiqa.serve.desk import ScoreOptions
from meiqa.serve.schemas import (
    AssessmentBody,
    CaseBody,
    CasesBody,
    ComparisonBody,
    ModelBody,
    RankingBody,
    RemovedBody,
    photo_body,
    photos_form,
    problems,
)
from meiqa.serve.uploads import read_photo, read_upload

if TYPE_CHECKING:
    from meiqa.memory.records import Record
    from meiqa.serve.app import Service

__all__ = ["Token", "authorise", "router", "service_of"]

T = TypeVar("T")
MOST_NEIGHBOURS = 256
GONE = 499
"""A status for the log only: nobody reads the answer."""
MOST_PHOTOS = 64
"""Photos of a ranking, as documented; the settings may allow fewer."""

router = APIRouter()
_bearer = HTTPBearer(
    auto_error=False, description="A key made by `meiqa api-key`, where the service has keys."
)


def _token(
    credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
) -> str | None:
    return None if credentials is None else credentials.credentials


Token = Annotated[str | None, Depends(_token)]
BudgetMs = Annotated[
    float | None,
    Query(
        gt=0,
        allow_inf_nan=False,
        description="Milliseconds until the answer, waiting included, from when the photo is here."
        " Left out: the service's usual budget.",
        examples=[500],
    ),
]
Neighbours = Annotated[
    int | None,
    Query(ge=0, le=MOST_NEIGHBOURS, description="How many remembered photos to compare with."),
]


def service_of(request: Request) -> Service:
    """Give what a request is served with."""
    service: Service = request.app.state.service
    return service


def authorise(keys: Keys | None, token: str | None, scope: Scope | None) -> Key | None:
    """Let a caller do something; see `Service.authorise`."""
    if keys is not None:
        return keys.holder(token, scope)
    if scope == "memory:write":
        raise AccessDenied(
            "without keys nobody writes to the memory over HTTP",
            hint="meiqa api-key NAME --scopes score,memory:write; meiqa serve --api-key-file",
        )
    return None


def _admit(request: Request, token: str | None, scope: Scope = "score") -> Service:
    """Check the caller's key, and note whose it is."""
    service = service_of(request)
    key = service.authorise(token, scope)
    request.state.key = None if key is None else key.name
    return service


@router.post(
    "/v1/score",
    response_model=AssessmentBody,
    responses=problems(401, 403, 413, 422, 503),
    openapi_extra=photo_body("reference"),
    tags=["judging"],
    summary="Score a photo",
)
async def score(
    request: Request,
    token: Token,
    budget_ms: BudgetMs = None,
    k: Neighbours = None,
    learn: Annotated[
        bool, Query(description="Remember what is learnt from it; takes the scope memory:write.")
    ] = False,
) -> Response:
    """Assess a photo: the request's body, or the field `image` of a form.

    A form may also hold a `reference`: the photo as it should be, of the same shape.
    """
    service = _admit(request, token)
    if learn:
        service.authorise(token, "memory:write")
    with service.holdings.holding() as holding:
        photo, reference = await read_photo(request, holding, service.settings, "reference")
        options = ScoreOptions(k=k, learn=learn, reference=reference)
        asked = service.desk.score(photo, budget_ms=_allowed(service, budget_ms), options=options)
        found = await _while_connected(request, asked)
    return json_answer(found.to_dict())


@router.post(
    "/v1/compare",
    response_model=ComparisonBody,
    responses=problems(401, 403, 413, 422, 503),
    openapi_extra=photos_form(first=True, second=True),
    tags=["judging"],
    summary="Tell which of two photos looks better",
)
async def compare(request: Request, token: Token, budget_ms: BudgetMs = None) -> Response:
    """Compare two photos, both ways round."""
    service = _admit(request, token)
    with service.holdings.holding() as holding:
        fields = {"first": 1, "second": 1}
        photos = (await read_upload(request, holding, service.settings, fields)).photos
        asked = service.desk.compare(
            photos["first"][0], photos["second"][0], budget_ms=_allowed(service, budget_ms)
        )
        found = await _while_connected(request, asked)
    return json_answer(found.to_dict())


@router.post(
    "/v1/rank",
    response_model=RankingBody,
    responses=problems(401, 403, 413, 422, 503),
    openapi_extra=photos_form(images=MOST_PHOTOS),
    tags=["judging"],
    summary="Put photos in order",
)
async def rank(
    request: Request, token: Token, budget_ms: BudgetMs = None, k: Neighbours = None
) -> Response:
    """Order photos, best first; the budget is for all of them together."""
    service = _admit(request, token)
    with service.holdings.holding() as holding:
        fields = {"images": min(MOST_PHOTOS, service.settings.max_photos)}
        upload = await read_upload(request, holding, service.settings, fields)
        photos = distinctly_named(upload.photos["images"])
        asked = service.desk.rank(photos, budget_ms=_allowed(service, budget_ms), k=k)
        found = await _while_connected(request, asked)
    return json_answer(
        {
            "photos": [photo.to_dict() for photo in found.photos],
            "failures": [failure.to_dict() for failure in found.failures],
        }
    )


@router.get(
    "/v1/model",
    response_model=ModelBody,
    responses=problems(401, 403),
    tags=["judging"],
    summary="What judges here",
)
async def model(request: Request, token: Token) -> Response:
    """Name the model, its memory and the service's limits."""
    service = _admit(request, token)
    engine = service.desk.engines[0]
    manifest, snapshot, settings = (
        engine.package.manifest,
        engine.memory.snapshot(),
        service.settings,
    )
    return json_answer(
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


@router.get(
    "/v1/memory/cases",
    response_model=CasesBody,
    responses=problems(401, 403, 422, 503),
    tags=["memory"],
    summary="List what is remembered",
)
async def list_cases(
    request: Request,
    token: Token,
    origin: Annotated[Literal["anchor", "contrast"] | None, Query()] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    offset: Annotated[int, Query(ge=0, le=1 << 40)] = 0,
) -> Response:
    """List remembered photos, anchors first, each origin by id."""
    service = _admit(request, token)
    memory = service.desk.engines[0].memory

    def page() -> dict[str, Any]:
        snapshot = memory.snapshot()
        counts = {"anchor": snapshot.count_anchors, "contrast": snapshot.count_contrast}
        total = sum(counts.values()) if origin is None else counts[origin]
        cases = [_case(record) for record in islice(memory.cases(origin), offset, offset + limit)]
        following = offset + limit if offset + limit < total else None
        return {"cases": cases, "total": total, "next": following}

    return json_answer(await asyncio.to_thread(page))


@router.post(
    "/v1/memory/cases",
    status_code=201,
    response_model=CaseBody,
    responses=problems(401, 403, 409, 413, 422, 503),
    openapi_extra=photo_body(),
    tags=["memory"],
    summary="Add a photo with its human score",
)
async def add_case(
    request: Request,
    token: Token,
    id: Annotated[str, Query(min_length=1, max_length=255, description="What it is called.")],
    score: Annotated[float, Query(ge=1, le=5, description="What people gave it.")],
    std: Annotated[float, Query(gt=0, le=5, description="Standard error of it.")] = ANCHOR_STD,
    provenance: Annotated[str, Query(max_length=255)] = "added over HTTP",
) -> Response:
    """Remember a photo as an anchor; it takes part in the next assessment."""
    service = _admit(request, token, "memory:write")
    _require_text(id, provenance)

    def add(engine: Engine) -> dict[str, Any]:
        if not isinstance(engine.vlm, LocalVlm):
            raise UsageError("only a local model makes anchors", hint="serve a package")
        memory = engine.memory
        case = anchor_case(engine.vlm, load_pixels(photo), id, score, std, key_kind=memory.key_kind)
        memory.add_anchor(case, provenance=provenance)
        return next(_case(record) for record in memory.cases("anchor") if record.id == id)

    with service.holdings.holding() as holding:
        photo, _ = await read_photo(request, holding, service.settings)
        added = await service.desk.run(add, budget_ms=service.settings.max_budget_ms)
    return json_answer(added, 201)


@router.delete(
    "/v1/memory/cases",
    response_model=RemovedBody,
    responses=problems(401, 403, 409, 422, 503),
    tags=["memory"],
    summary="Remove what is remembered",
)
async def remove_cases(
    request: Request,
    token: Token,
    id: Annotated[list[str], Query(min_length=1, max_length=1000, description="Which.")],
) -> Response:
    """Remove cases by their ids, for good."""
    service = _admit(request, token, "memory:write")
    _require_text(*id)
    memory = service.desk.engines[0].memory
    return json_answer({"removed": await asyncio.to_thread(memory.remove, id)})


def _case(record: Record) -> dict[str, Any]:
    names = ("id", "origin", "score", "std", "summary", "provenance", "created")
    return {name: getattr(record, name) for name in names}


def _require_text(*texts: str) -> None:
    """Refuse what no file of a memory could be written with."""
    for text in texts:
        if not text.isprintable():
            raise UsageError("ids and provenances are printable text", seen=ascii(text)[:64])


def _allowed(service: Service, budget_ms: float | None) -> float | None:
    most_ms = service.settings.max_budget_ms
    if budget_ms is not None and budget_ms > most_ms:
        raise UsageError(
            "the budget is longer than this service allows",
            seen=f"{budget_ms:g} ms",
            allowed=f"at most {most_ms:g} ms",
        )
    return budget_ms


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
