"""Routes for those who run the service: is it there, is it ready, what does it count."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST

from meiqa.serve.answers import json_answer
from meiqa.serve.routes import Token, service_of
from meiqa.serve.schemas import HealthBody, problems

__all__ = ["router"]

router = APIRouter(tags=["watching"])


@router.get("/healthz", response_model=HealthBody, summary="Whether the process answers")
async def health() -> Response:
    """Answer as long as the process lives."""
    return json_answer({"status": "ok"})


@router.get(
    "/readyz",
    response_model=HealthBody,
    responses={503: {"model": HealthBody, "description": "It is starting or ending."}},
    summary="Whether photos are taken",
)
async def readiness(request: Request) -> Response:
    """Tell a load balancer whether to send photos."""
    if service_of(request).desk.ready:
        return json_answer({"status": "ready"})
    return json_answer({"status": "not ready"}, 503)


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {}}}, **problems(401)},
    summary="Counters for Prometheus; with keys, for those who have one",
)
async def metrics(request: Request, token: Token) -> Response:
    """Give the counters in Prometheus' text format."""
    service = service_of(request)
    if service.settings.keys is not None:
        service.authorise(token)
    return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)
