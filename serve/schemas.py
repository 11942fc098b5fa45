"""The shapes of answers, for the OpenAPI document; what is sent is made by the types themselves."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

__all__ = [
    "AssessmentBody",
    "CaseBody",
    "CasesBody",
    "ComparisonBody",
    "HealthBody",
    "ModelBody",
    "ProblemBody",
    "RankingBody",
    "RemovedBody",
    "photo_body",
    "photos_form",
    "problems",
]


class NeighbourBody(BaseModel):
    """A remembered photo, and the probability that this one looks better."""

    id: str
    origin: Literal["anchor", "contrast"]
    score: float
    preference: float | None


class AssessmentBody(BaseModel):
    """The quality of a photo, and how it was found."""

    model_config = ConfigDict(
        extra="allow",
        json_schema_extra={
            "example": {
                "path": "photo.jpg",
                "score": 3.84,
                "std": 0.46,
                "ci95": [2.94, 4.74],
                "initial_score": 4.65,
                "word": "good",
                "percentile": 74.2,
                "summary": "Barely visible jitter. The picture is sharp and well exposed.",
                "neighbours": [
                    {"id": "a.jpg", "origin": "anchor", "score": 2.92, "preference": 0.67}
                ],
                "degraded": [],
                "reflection": None,
                "timings_ms": {"queue": 0.3, "decode": 9.1, "read": 21.0, "total": 240.2},
                "counters": {"visual_tokens": 60, "comparisons": 64},
            }
        },
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


class ComparisonBody(BaseModel):
    """Two photos side by side; `preference` is the probability that the first looks better."""

    model_config = ConfigDict(
        extra="allow",
        json_schema_extra={
            "example": {
                "first": "a.jpg",
                "second": "b.jpg",
                "preference": 0.83,
                "first_score": 3.84,
                "second_score": 2.19,
                "timings_ms": {"total": 420.0},
            }
        },
    )

    first: str
    second: str
    preference: float
    first_score: float
    second_score: float
    timings_ms: dict[str, float]


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
    """Photos, best first, and those that cannot be judged."""

    photos: list[RankedBody]
    failures: list[FailureBody]


class CaseBody(BaseModel):
    """A remembered photo; `created` is in seconds since 1970."""

    id: str
    origin: Literal["anchor", "contrast"]
    score: float
    std: float
    summary: str
    provenance: str
    created: float


class CasesBody(BaseModel):
    """A page of the memory; `next` is the offset of the one after it."""

    cases: list[CaseBody]
    total: int
    next: int | None


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

    model_config = ConfigDict(
        extra="allow",
        json_schema_extra={
            "example": {
                "type": "urn:meiqa:problem:overloaded",
                "title": "Overloaded",
                "status": 503,
                "detail": "an answer would come too late; ask again in 180 ms",
                "request_id": "5e1f0c…",
                "what": "an answer would come too late",
                "seen": None,
                "allowed": None,
                "hint": "ask again in 180 ms, or allow more time: budget_ms",
                "retryable": True,
                "retry_after_ms": 180,
            }
        },
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
            "content": {
                "application/problem+json": {
                    "schema": {"$ref": "#/components/schemas/ProblemBody"},
                }
            },
        }
        for status in statuses
    }


_FILE = {"type": "string", "format": "binary"}


def photo_body(*optional: str) -> dict[str, Any]:
    """Document a body that is a photo, or a form with one, and perhaps with others beside it."""
    form = photos_form(image=True, **dict.fromkeys(optional, False))
    return {
        "requestBody": {
            "required": True,
            "content": {
                "image/*": {"schema": _FILE},
                "application/octet-stream": {"schema": _FILE},
                **form["requestBody"]["content"],
            },
        }
    }


def photos_form(**fields: bool | int) -> dict[str, Any]:
    """Document a form; a field is True for a photo, False for one that may be, or how many."""

    def schema(field: bool | int) -> dict[str, Any]:
        if isinstance(field, bool):
            return _FILE
        return {"type": "array", "items": _FILE, "minItems": 1, "maxItems": field}

    form = {
        "type": "object",
        "properties": {name: schema(field) for name, field in fields.items()},
        "required": [name for name, field in fields.items() if field is not False],
    }
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": form}}}}
