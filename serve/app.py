"""The service: an ASGI application, and the process that serves it."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

import meiqa
from meiqa.engine.engine import Engine
from meiqa.errors import MeiqaError, ServiceError, UsageError
from meiqa.serve import live, routes
from meiqa.serve.access import Settings, is_loopback
from meiqa.serve.middleware import Metrics, Middleware
from meiqa.serve.responses import PROBLEM, ProblemBody, json_response, problem_response, unforeseen
from meiqa.serve.scheduler import Scheduler
from meiqa.serve.uploads import UploadLimiter

LOG = logging.getLogger(__name__)
_DESCRIPTION = """Scores photographs from 1.00 to 5.00, says how sure it is, and says why.

A request's budget counts from the moment its photo has arrived, waiting included. What can't be
answered in time is refused at once with 503 and `Retry-After`. Errors are problem details
(RFC 9457)."""
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' blob: data:; media-src 'self' blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}
_BACKLOG = 512
_FRAME_BYTES = 8 << 20
_TURN_S = 0.001
"""Python threads take turns this often, so that an engine does not hold up the event loop."""


def create_app(engine: Engine | Sequence[Engine], settings: Settings | None = None) -> FastAPI:
    """Make a service of an engine, or of several that share a memory; it does not close them."""
    settings = settings or Settings()
    engines = list(engine) if isinstance(engine, Sequence) else [engine]
    metrics = Metrics()
    scheduler = Scheduler(engines, settings, metrics)
    uploads = UploadLimiter(settings.max_held_bytes, metrics.held_bytes)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await asyncio.to_thread(scheduler.start)
        try:
            yield
        finally:
            await asyncio.to_thread(scheduler.close)

    app = FastAPI(
        title="meiqa",
        version=meiqa.__version__,
        description=_DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,  # these pages fetch their scripts from elsewhere
        redoc_url=None,
    )
    app.state.service = routes.Service(scheduler, settings, metrics, uploads)
    app.add_middleware(Middleware, settings=settings, metrics=metrics)
    if settings.origins:  # around everything, so that such a page can read refusals, too
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["Authorization", "Content-Type", "X-Request-Id"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    app.include_router(routes.router)
    app.include_router(live.router)
    _answer_errors_with_problems(app)
    _serve_the_page(app)
    return app


class _Page(StaticFiles):
    """The camera page: plain files that load nothing from elsewhere and run only their script."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers.update(PAGE_HEADERS)
        return response


def _serve_the_page(app: FastAPI) -> None:
    """Serve the camera page, behind everything else."""
    page = _Page(directory=Path(__file__).parent / "page", html=True)
    otherwise = app.router.default

    async def page_or_nothing(scope: Scope, receive: Receive, send: Send) -> None:
        found = page if scope["type"] == "http" else otherwise
        await found(scope, receive, send)

    # A mount at / would take what routes refuse, as a GET of what is only posted.
    app.router.default = page_or_nothing


def _answer_errors_with_problems(app: FastAPI) -> None:
    """Answer every error with problem details, and add their schema to the OpenAPI document."""

    @app.exception_handler(MeiqaError)
    async def of_ours(request: Request, error: MeiqaError) -> Response:
        request.app.state.service.metrics.refused.labels(type(error).__name__).inc()
        return problem_response(error, request.state.request_id)

    @app.exception_handler(RequestValidationError)
    async def of_arguments(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"][1:])
        problem = UsageError(f"{name}: {first['msg']}", seen=str(first.get("input"))[:64] or None)
        return problem_response(problem, request.state.request_id)

    @app.exception_handler(HTTPException)
    async def of_http(request: Request, error: HTTPException) -> Response:
        problem = ServiceError(str(error.detail), hint="see /openapi.json")
        response = problem_response(problem, request.state.request_id, error.status_code)
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def of_anything(request: Request, error: Exception) -> Response:
        request_id = request.state.request_id
        LOG.error("request %s failed", request_id, exc_info=error)
        return json_response(unforeseen(request_id), 500, PROBLEM)

    document = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document()["components"]["schemas"]["ProblemBody"] = ProblemBody.model_json_schema()
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def listen(host: str, port: int, settings: Settings) -> socket.socket:
    """Open the socket of a service; without keys, on the loopback interface only.

    Raises:
        UsageError: the host may not, or the address cannot, be listened on.
    """
    if settings.keys is None and not is_loopback(host):
        raise UsageError(
            "without keys the service is for this machine only",
            seen=f"--host {host}",
            allowed="127.0.0.1, ::1 or localhost",
            hint="meiqa api-key NAME --file KEYS, then meiqa serve --api-key-file KEYS",
        )
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        opened = socket.socket(family, kind, protocol)
        try:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            opened.bind(address)
        except BaseException:
            opened.close()
            raise
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(
            f"nothing can listen on {host}, port {port}: {reason}", hint="choose another --port"
        ) from None
    return opened


@contextmanager
def engines_sharing(
    open_first: Callable[[int | None], Engine], workers: int, device: str, threads: int | None
) -> Iterator[list[Engine]]:
    """Open engines that work side by side on one memory.

    Args:
        open_first: opens an engine with so many threads.
        workers: how many engines.
        threads: of each; by default the cores are shared out between them.
    """
    if threads is None and workers > 1:
        threads = max(1, (os.cpu_count() or 1) // workers)
    with open_first(threads) as first:
        yield [first, *(first.beside(device, threads) for _ in range(workers - 1))]


def run(engines: list[Engine], settings: Settings, opened: socket.socket) -> None:
    """Serve until SIGTERM or SIGINT; what was accepted is finished before this returns."""
    longest_s = settings.upload_s + settings.max_budget_ms / 1e3
    config = uvicorn.Config(
        create_app(engines, settings),
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=_BACKLOG,
        limit_concurrency=8 * settings.max_requests,
        timeout_graceful_shutdown=round(longest_s) + 5,
        ws_max_size=_FRAME_BYTES,
        ws_max_queue=2,
    )
    server = uvicorn.Server(config)
    sys.setswitchinterval(_TURN_S)
    # uvicorn sends itself the signals again once it has ended: the end has been orderly by then.
    before = {
        each: signal.signal(each, lambda *_: None) for each in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        server.run(sockets=[opened])
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    if not server.started:
        raise UsageError("the service did not start", hint="the log above says why")
    LOG.info("ended; everything that was accepted is answered")
