"""What every request passes: who may ask at all, its id, its line in the log, its count."""

from __future__ import annotations

import logging
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from meiqa.errors import AccessDenied, MeiqaError, Overloaded
from meiqa.serve.access import refuse_strangers
from meiqa.serve.answers import problem_answer
from meiqa.serve.metrics import Metrics
from meiqa.serve.settings import Settings

__all__ = ["Gate"]

LOG = logging.getLogger("meiqa.serve.requests")
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_FREE = ("/healthz", "/readyz", "/metrics")
"""Whoever watches the service is let in however many requests there are."""


class Gate:
    """ASGI middleware around the whole service."""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        self._app = app
        self._settings = settings
        self._metrics = metrics
        self._inside = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request or a WebSocket through, or answer it here."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        status = 0

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        self._inside += 1
        try:
            self._refuse(headers, scope["path"])
            await self._app(scope, receive, noted)
        except MeiqaError as error:
            if scope["type"] == "websocket":
                await _turn_away(receive, send)
            else:
                await problem_answer(error, request_id)(scope, receive, noted)
        finally:
            self._inside -= 1
            if scope["type"] == "http":
                self._note(scope, status, 1e3 * (time.perf_counter() - began), request_id)

    def _refuse(self, headers: Headers, path: str) -> None:
        if self._settings.keys is None:
            refuse_strangers(headers.get("host"), headers.get("origin"))
        if self._inside > self._settings.max_requests and path not in _FREE:
            error = Overloaded("too many requests at once", hint="ask again in a second")
            error.retry_after_s = 1.0
            raise error

    def _note(self, scope: Scope, status: int, took_ms: float, request_id: str) -> None:
        route = getattr(scope.get("route"), "path", "other")
        self._metrics.requests.labels(route, status).inc()
        self._metrics.request_seconds.labels(route).observe(took_ms / 1e3)
        LOG.info(
            "%s %s %s",
            scope["method"],
            scope["path"],
            status,
            extra={
                "request_id": request_id,
                "method": scope["method"],
                "path": scope["path"],
                "status": status,
                "ms": round(took_ms, 3),
                "key": scope["state"].get("key"),
            },
        )


async def _turn_away(receive: Receive, send: Send) -> None:
    """Close a WebSocket before it opens: a policy was violated."""
    await receive()
    await send({"type": "websocket.close", "code": 1008, "reason": AccessDenied.__doc__ or ""})
