"""Responses: JSON as the command line writes it, errors as RFC 9457 problem details, their schemas.

A problem's `type` is `urn:meiqa:problem:` and the error's name in lower case with hyphens. Beside
the members of the RFC stand those of the library's errors: `what`, `seen`, `allowed`, `hint`,
`retryable`. The schemas are for the OpenAPI document; what is sent is made by the types themselves.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Literal

from fastapi import Response
from pydantic import BaseModel, ConfigDict

from meiqa import errors
from meiqa.errors import MeiqaError, ServiceError, one_line
from meiqa.formats import json_text
from meiqa.types import RememberedCase

PROBLEM = "application/problem+json"
_STATUS: Mapping[type[MeiqaError], int] = {
    errors.KeyRequired: 401,
    errors.AccessDenied: 403,
    errors.UploadTooLarge: 413,
    errors.ImageTooLarge: 413,
    errors.ImageError: 422,
    errors.UsageError: 422,
    errors.StoreUnwritable: 409,
}
"""The others are the service's own trouble, which may pass: 503."""


def json_response(value: Any, status: int = 200, media_type: str = "application/json") -> Response:
    """Respond with JSON; what is not a number is null."""
    return Response(json_text(value), status, media_type=media_type)


def problem_response(error: MeiqaError, request_id: str, status: int | None = None) -> Response:
    """Respond with problem details, and with the headers that go with them."""
    problem = problem_of(error, request_id, status)
    response = json_response(problem, problem["status"], PROBLEM)
    after_s = getattr(error, "retry_after_s", None)
    if after_s is not None or problem["status"] == 503:
        response.headers["Retry-After"] = str(max(1, math.ceil(after_s or 1.0)))
    if isinstance(error, errors.KeyRequired):
        response.headers["WWW-Authenticate"] = "Bearer"
    return response


def status_of(error: MeiqaError) -> int:
    """Give the HTTP status of an error."""
    return next((_STATUS[kind] for kind in type(error).__mro__ if kind in _STATUS), 503)


def problem_of(error: MeiqaError, request_id: str, status: int | None = None) -> dict[str, Any]:
    """Describe an error."""

    def words(value: object | None) -> str | None:
        return None if value is None else one_line(str(value))

    title = re.sub(r"(?<!^)(?=[A-Z])", " ", type(error).__name__).lower()
    problem = {
        "type": "urn:meiqa:problem:" + title.replace(" ", "-"),
        "title": title.capitalize(),
        "status": status_of(error) if status is None else status,
        "detail": words(error),
        "request_id": request_id,
        "what": words(error.what),
        "seen": words(error.seen),
        "allowed": words(error.allowed),
        "hint": words(error.hint),
        "retryable": error.retryable,
    }
    if (retry_after_s := getattr(error, "retry_after_s", None)) is not None:
        problem["retry_after_ms"] = math.ceil(1e3 * retry_after_s)
    return problem


def unforeseen(request_id: str) -> dict[str, Any]:
    """Describe an error that nobody foresaw, without its particulars."""
    error = ServiceError("something went wrong inside", hint="the service's log says what")
    return {**problem_of(error, request_id, 500), "type": "about:blank"}


def _with_example(**fields: Any) -> ConfigDict:
    return ConfigDict(extra="allow", json_schema_extra={"example": fields})


class NeighbourBody(BaseModel):
    """A remembered photo, and the probability that this one looks better."""

    id: str
    origin: Literal["anchor", "contrast"]
    score: float
    preference: float | None
    device: str | None


class AssessmentBody(BaseModel):
    """The quality of a photo, and how it was found."""

    model_config = _with_example(
        path="photo.jpg",
        score=3.84,
        std=0.46,
        ci95=[2.94, 4.74],
        initial_score=4.65,
        word="good",
        percentile=74.2,
        summary="Barely visible jitter. The picture is sharp and well exposed.",
        neighbours=[
            {"id": "a.jpg", "origin": "anchor", "score": 2.92, "preference": 0.67, "device": None}
        ],
        degraded=[],
        reflection=None,
        timings_ms={"queue": 0.3, "decode": 9.1, "read": 21.0, "total": 240.2},
        counters={"visual_tokens": 60, "comparisons": 64},
    )

    path: str
    score: float
    std: float
    ci95: tuple[float, float]
    initial_score: float
    word: Literal["bad", "poor", "fair", "good", "excellent"]
    percentile: float | None
    summary: str | None
    neighbours: list[NeighbourBody]
    degraded: list[str]
    reflection: str | None
    timings_ms: dict[str, float]
    counters: dict[str, int]


class RankedBody(BaseModel):
    """A photo's place; `places` is how far the comparisons among the photos moved it."""

    model_config = ConfigDict(extra="allow")

    rank: int
    path: str
    score: float
    std: float
    alone: float
    compared: int
    places: int


class FailureBody(BaseModel):
    """A photo that cannot be judged, and why."""

    path: str
    error: str
    hint: str | None


class RankingBody(BaseModel):
    """Photos, best first, those that cannot be judged, and what the budget left out."""

    photos: list[RankedBody]
    failures: list[FailureBody]
    degraded: list[str]


class AnswerBody(BaseModel):
    """How probable each option is: among the options, and as what the reply goes on with."""

    model_config = _with_example(
        path="photo.jpg",
        question="Is there motion blur?",
        probabilities={"yes": 0.17, "no": 0.83},
        logprobs={"yes": -1.9, "no": -0.31},
        second=None,
    )

    path: str
    question: str
    probabilities: dict[str, float]
    logprobs: dict[str, float]
    second: str | None


class AnswersBody(BaseModel):
    """Answers in the order of the questions, and of the second photos for each."""

    answers: list[AnswerBody]


class CasesBody(BaseModel):
    """A page of the memory; `next` is the offset of the one after it."""

    cases: list[RememberedCase]
    total: int
    next: int | None


class PicturedCase(RememberedCase):
    """A remembered photo with its thumbnail, a JPEG in base64, or null where none is kept."""

    thumbnail: str | None


class ChosenCasesBody(BaseModel):
    """Those that were asked for, as far as they are remembered, in the order asked."""

    cases: list[PicturedCase]


class RemovedBody(BaseModel):
    """How many cases were removed."""

    removed: int


class ModelBody(BaseModel):
    """What judges, and what it is compared with."""

    model_config = ConfigDict(extra="allow")

    version: str
    architecture: str
    digest: str
    precision: str
    prompt: str
    neighbours: int
    max_pixels: int
    memory: dict[str, int]
    limits: dict[str, float]


class HealthBody(BaseModel):
    """The state of the service."""

    status: Literal["ok", "ready", "not ready"]


class ProblemBody(BaseModel):
    """RFC 9457 problem details, with the members of the library's errors."""

    model_config = _with_example(
        type="urn:meiqa:problem:overloaded",
        title="Overloaded",
        status=503,
        detail="an answer would come too late; ask again in 180 ms",
        request_id="5e1f0c…",
        what="an answer would come too late",
        seen=None,
        allowed=None,
        hint="ask again in 180 ms, or allow more time: budget_ms",
        retryable=True,
        retry_after_ms=180,
    )

    type: str
    title: str
    status: int
    detail: str
    request_id: str
    what: str | None = None
    seen: str | None = None
    allowed: str | None = None
    hint: str | None = None
    retryable: bool = False
    retry_after_ms: int | None = None


_MEANINGS = {
    400: "The request is not HTTP as it should be.",
    401: "There is no key, or nobody has it.",
    403: "The key lacks the scope, or the request comes from where it may not.",
    404: "There is no such thing.",
    409: "The memory is not open for writing.",
    413: "Too many bytes or pixels, or an upload that takes too long.",
    422: "The photo cannot be judged, or an argument makes no sense.",
    503: "The answer would come too late; `Retry-After` says when to ask again.",
}


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Document the errors of a route."""
    return {
        status: {
            "description": _MEANINGS[status],
            "content": {PROBLEM: {"schema": {"$ref": "#/components/schemas/ProblemBody"}}},
        }
        for status in statuses
    }
