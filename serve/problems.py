"""Errors as RFC 9457 problem details, and back again for the client.

`type` is `urn:meiqa:problem:` and the error's name in lower case with hyphens. Beside the members
of the RFC stand those of the library's errors: `what`, `seen`, `allowed`, `hint`, `retryable`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from meiqa import errors
from meiqa.errors import MeiqaError, ServiceError, one_line

__all__ = ["MEDIA_TYPE", "error_from", "problem_of", "status_of"]

MEDIA_TYPE = "application/problem+json"
_PREFIX = "urn:meiqa:problem:"
_INTERNAL = ServiceError("something went wrong inside", hint="the service's log says what")

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


def status_of(error: MeiqaError) -> int:
    """Give the HTTP status of an error."""
    return next((_STATUS[kind] for kind in type(error).__mro__ if kind in _STATUS), 503)


def problem_of(error: MeiqaError, status: int, request_id: str) -> dict[str, Any]:
    """Describe an error."""

    def words(value: object | None) -> str | None:
        return None if value is None else one_line(str(value))

    title = re.sub(r"(?<!^)(?=[A-Z])", " ", type(error).__name__).lower()
    retry_after_s = getattr(error, "retry_after_s", None)
    problem = {
        "type": _PREFIX + title.replace(" ", "-"),
        "title": title.capitalize(),
        "status": status,
        "detail": words(error),
        "request_id": request_id,
        "what": words(error.what),
        "seen": words(error.seen),
        "allowed": words(error.allowed),
        "hint": words(error.hint),
        "retryable": error.retryable,
    }
    if retry_after_s is not None:
        problem["retry_after_ms"] = math.ceil(1e3 * retry_after_s)
    return problem


def internal_problem(request_id: str) -> dict[str, Any]:
    """Describe an error that nobody foresaw, without its particulars."""
    return {**problem_of(_INTERNAL, 500, request_id), "type": "about:blank"}


def error_from(problem: Mapping[str, Any]) -> MeiqaError:
    """Make the library's error of a problem, whatever else answers with one."""
    name = str(problem.get("type", "")).removeprefix(_PREFIX).replace("-", " ").title()
    kind = getattr(errors, name.replace(" ", ""), ServiceError)
    if not (isinstance(kind, type) and issubclass(kind, MeiqaError)):
        kind = ServiceError
    what = problem.get("what") or problem.get("detail") or problem.get("title") or "no reason given"
    error = kind(
        str(what),
        seen=problem.get("seen"),
        allowed=problem.get("allowed"),
        hint=problem.get("hint"),
    )
    after_ms = problem.get("retry_after_ms")
    if isinstance(error, ServiceError) and isinstance(after_ms, int | float):
        error.retry_after_s = after_ms / 1e3
    return error
