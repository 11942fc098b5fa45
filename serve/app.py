"""The service as an ASGI application."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.types import Receive, Send
from starlette.types import Scope as AsgiScope

import meiqa
from meiqa.engine.pipeline import Engine
from meiqa.errors import MeiqaError, ServiceError, UsageError
from meiqa.formats import json_text
from meiqa.serve import live, routes, watching
from meiqa.serve.access import Key, Scope
from meiqa.serve.answers import problem_answer
from meiqa.serve.desk import Desk
from meiqa.serve.gate import Gate
from meiqa.serve.metrics import Metrics
from meiqa.serve.page_files import PageFiles
from meiqa.serve.problems import MEDIA_TYPE, internal_problem
from meiqa.serve.schemas import ProblemBody
from meiqa.serve.settings import Settings
from meiqa.serve.uploads import Holdings

__all__ = ["Service", "create_app"]

LOG = logging.getLogger(__name__)
_DESCRIPTION = """Scores photographs from 1.00 to 5.00, says how sure it is, and says why.

A request's budget counts from the moment its photo has arrived, waiting included. What can't be
answered in time is refused at once with 503 and `Retry-After`. Errors are problem details
(RFC 9457)."""


@dataclass(frozen=True, eq=False)
class Service:
    """What routes work with; it is `app.state.service`."""

    desk: Desk
    settings: Settings
    metrics: Metrics
    holdings: Holdings

    def authorise(self, token: str | None, scope: Scope | None = None) -> Key | None:
        """Let a caller do something; None where the service has no keys.

        Raises:
            AccessDenied: there is no key, it is unknown or lacks the scope; without keys, for
                anything but scoring.
        """
        return routes.authorise(self.settings.keys, token, scope)


def create_app(engine: Engine | Sequence[Engine], settings: Settings | None = None) -> FastAPI:
    """Make a service of an engine, or of several that share a memory; it does not close them."""
    settings = settings or Settings()
    engines = [engine] if isinstance(engine, Engine) else list(engine)
    metrics = Metrics()
    desk = Desk(engines, settings, metrics)
    service = Service(desk, settings, metrics, Holdings(settings.max_held_bytes, metrics))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await asyncio.to_thread(desk.start)
        try:
            yield
        finally:
            await asyncio.to_thread(desk.close)

    app = FastAPI(
        title="meiqa",
        version=meiqa.__version__,
        description=_DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,  # these pages fetch their scripts from elsewhere
        redoc_url=None,
    )
    app.state.service = service
    app.add_middleware(Gate, settings=settings, metrics=metrics)
    _add_problems(app)
    app.include_router(routes.router)
    app.include_router(watching.router)
    _add_page(app)
    _document_problems(app)
    return app


def _add_page(app: FastAPI) -> None:
    """Serve the camera page, behind everything else."""
    app.include_router(live.router)
    page, otherwise = PageFiles(), app.router.default

    async def page_or_nothing(scope: AsgiScope, receive: Receive, send: Send) -> None:
        found = page if scope["type"] == "http" else otherwise
        await found(scope, receive, send)

    # A mount at / would take what routes refuse, as a GET of what is only posted.
    app.router.default = page_or_nothing


def _add_problems(app: FastAPI) -> None:
    """Answer every error with problem details."""

    @app.exception_handler(MeiqaError)
    async def of_ours(request: Request, error: MeiqaError) -> Response:
        request.app.state.service.metrics.refused.labels(type(error).__name__).inc()
        return problem_answer(error, request.state.request_id)

    @app.exception_handler(RequestValidationError)
    async def of_arguments(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"][1:])
        problem = UsageError(f"{name}: {first['msg']}", seen=str(first.get("input"))[:64] or None)
        return problem_answer(problem, request.state.request_id)

    @app.exception_handler(HTTPException)
    async def of_http(request: Request, error: HTTPException) -> Response:
        problem = ServiceError(str(error.detail), hint="see /openapi.json")
        answer = problem_answer(problem, request.state.request_id, error.status_code)
        answer.headers.update(error.headers or {})
        return answer

    @app.exception_handler(Exception)
    async def of_anything(request: Request, error: Exception) -> Response:
        request_id = request.state.request_id
        LOG.error("request %s failed", request_id, exc_info=error)
        return Response(json_text(internal_problem(request_id)), 500, media_type=MEDIA_TYPE)


def _document_problems(app: FastAPI) -> None:
    """Add the schema of problems to the OpenAPI document."""
    made = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = ProblemBody.model_json_schema()
            made()["components"]["schemas"]["ProblemBody"] = schema
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
