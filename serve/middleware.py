"""What every request passes: may it ask at all, its id, its count and its line in the log."""

from __future__ import annotations

import json
import logging
import re
import sys
import time
import uuid
from datetime import UTC, datetime
from typing import Literal, TextIO

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from meiqa.errors import MeiqaError, Overloaded
from meiqa.serve.access import Settings, refuse_other_sites
from meiqa.serve.responses import problem_response
from meiqa.types import Assessment

LOG = logging.getLogger("meiqa.serve.requests")
LogFormat = Literal["text", "json"]
_TEXT = "%(asctime)s %(levelname)-7s %(message)s"
_LOGGED = ("request_id", "method", "path", "status", "ms", "key")
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_ALWAYS_OPEN = ("/healthz", "/readyz", "/metrics")
"""Whoever watches the service is let in however many requests there are."""
_POLICY_VIOLATED = 1008
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0, 30.0)
_SCORES = (1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5)


class Metrics:
    """Counters, gauges and histograms of one service, in a registry of its own."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        ProcessCollector(registry=registry)

        def seconds(name: str, documentation: str, *labels: str) -> Histogram:
            return Histogram(name, documentation, labels, buckets=_SECONDS, registry=registry)

        def count(name: str, documentation: str, *labels: str) -> Counter:
            return Counter(name, documentation, labels, registry=registry)

        def gauge(name: str, documentation: str) -> Gauge:
            return Gauge(name, documentation, registry=registry)

        self.requests = count("meiqa_requests", "Requests answered.", "route", "status")
        self.request_seconds = seconds(
            "meiqa_request_seconds", "From a request's first byte to its answer.", "route"
        )
        self.refused = count("meiqa_refused", "Requests refused, by the problem.", "problem")
        self.queue_seconds = seconds(
            "meiqa_queue_seconds", "How long a request waited for an engine."
        )
        self.stage_seconds = seconds(
            "meiqa_stage_seconds", "Stages of an assessment; `total` is all of them.", "stage"
        )
        self.scores = Histogram("meiqa_score", "Scores given.", buckets=_SCORES, registry=registry)
        self.degraded = count("meiqa_degraded", "Assessments that left something out.")
        self.late = count("meiqa_late", "Answers that came after their deadline.")
        self.waiting = gauge("meiqa_waiting", "Requests that wait.")
        self.held_bytes = gauge("meiqa_held_bytes", "Bytes of uploads that are held.")
        self.least_seconds = gauge("meiqa_least_seconds", "Time kept for every photo that waits.")

    def assessed(self, result: Assessment) -> None:
        """Count an assessment."""
        self.scores.observe(result.score)
        if result.left_out:
            self.degraded.inc()
        for stage, ms in result.timings_ms.items():
            self.stage_seconds.labels(stage).observe(ms / 1e3)

    def text(self) -> bytes:
        """Write everything in Prometheus' text format."""
        return generate_latest(self.registry)


class Middleware:
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
            if scope["type"] == "websocket":  # it is closed before it opens
                await receive()
                reason = "the request is not let in"
                closing = {"type": "websocket.close", "code": _POLICY_VIOLATED, "reason": reason}
                await send(closing)
            else:
                await problem_response(error, request_id)(scope, receive, noted)
        finally:
            self._inside -= 1
            if scope["type"] == "http":
                self._note(scope, status, 1e3 * (time.perf_counter() - began), request_id)

    def _refuse(self, headers: Headers, path: str) -> None:
        if self._settings.keys is None:
            remedy = "give it keys: meiqa serve --api-key-file"
            allowed = self._settings.origins
            refuse_other_sites(headers.get("host"), headers.get("origin"), allowed, remedy)
        if self._inside > self._settings.max_requests and path not in _ALWAYS_OPEN:
            error = Overloaded("too many requests at once", hint="ask again in a second")
            error.retry_after_s = 1.0
            raise error

    def _note(self, scope: Scope, status: int, took_ms: float, request_id: str) -> None:
        route = getattr(scope.get("route"), "path", "other")
        self._metrics.requests.labels(route, status).inc()
        self._metrics.request_seconds.labels(route).observe(took_ms / 1e3)
        noted = {
            "request_id": request_id,
            "method": scope["method"],
            "path": scope["path"],
            "status": status,
            "ms": round(took_ms, 3),
            "key": scope["state"].get("key"),
        }
        LOG.info("%(method)s %(path)s %(status)s %(ms).0f ms [%(request_id)s]", noted, extra=noted)


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **{name: getattr(record, name) for name in _LOGGED if hasattr(record, name)},
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def log_to(stream: TextIO | None = None, form: LogFormat = "text") -> None:
    """Write what the service logs to a stream (stderr), and nothing else's chatter."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(_JsonLines() if form == "json" else logging.Formatter(_TEXT))
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("meiqa").setLevel(logging.INFO)
