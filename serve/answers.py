"""Answers: JSON as the command line writes it, and problems."""

from __future__ import annotations

import math
from typing import Any

from fastapi import Response

from meiqa.errors import KeyRequired, MeiqaError
from meiqa.formats import json_text
from meiqa.serve.problems import MEDIA_TYPE, problem_of, status_of

__all__ = ["json_answer", "problem_answer"]


def json_answer(value: Any, status: int = 200) -> Response:
    """Answer with JSON; what is not a number is null."""
    return Response(json_text(value), status, media_type="application/json")


def problem_answer(error: MeiqaError, request_id: str, status: int | None = None) -> Response:
    """Answer with problem details, and with the headers that go with them."""
    status = status_of(error) if status is None else status
    headers = {"X-Request-Id": request_id}
    after_s = getattr(error, "retry_after_s", None)
    if after_s is not None:
        headers["Retry-After"] = str(max(1, math.ceil(after_s)))
    elif status == 503:
        headers["Retry-After"] = "1"
    if isinstance(error, KeyRequired):
        headers["WWW-Authenticate"] = "Bearer"
    return Response(json_text(problem_of(error, status, request_id)), status, headers, MEDIA_TYPE)
