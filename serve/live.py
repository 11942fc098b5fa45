"""`/v1/live`: frames of a camera come in over a WebSocket, and answers go out.

The client says hello, with its key if the service has keys, and then sends frames, each a JPEG in a
binary message. Only the newest frame is kept while one is assessed: older ones are dropped, and
counted. Each frame that is taken up gets one answer, a JSON object with its number.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter
from starlette.websockets import WebSocket, WebSocketDisconnect

import meiqa
from meiqa.engine.images import NamedBytes, load_pixels
from meiqa.errors import MeiqaError, Overloaded, UploadTooLarge, UsageError
from meiqa.formats import json_text
from meiqa.serve.desk import ScoreOptions
from meiqa.serve.problems import internal_problem, problem_of, status_of
from meiqa.serve.viewing import FAST_NEIGHBOURS, View, Viewing
from meiqa.types import Assessment

if TYPE_CHECKING:
    from meiqa.serve.app import Service

__all__ = ["router"]

LOG = logging.getLogger(__name__)
clock = time.monotonic
router = APIRouter()
MOST_FRAME_BYTES = 4 << 20
MOST_FRAME_PIXELS = 9_000_000
MOST_HELLO_CHARACTERS = 4096
HELLO_S = 10.0
IDLE_S = 120.0
"""A camera from which nothing comes for so long is taken to be gone."""
_POLICY, _TOO_BIG, _TRY_LATER = 1008, 1009, 1013


@dataclass(frozen=True)
class Frame:
    """A frame of the camera; numbers count from 0 in the order in which they came."""

    number: int
    jpeg: NamedBytes
    came_s: float


class Newest:
    """Holds the frame that came last until somebody takes it up.

    Args:
        hold: told how many bytes more are held, or fewer; may refuse.
    """

    def __init__(self, hold: Callable[[int], None]) -> None:
        self._hold = hold
        self._frame: Frame | None = None
        self._came = asyncio.Event()
        self._count = 0
        self.dropped = 0

    def put(self, jpeg: bytes, came_s: float) -> None:
        """Keep a frame in place of the one before.

        Raises:
            Overloaded: the service holds too many bytes.
        """
        number, self._count = self._count, self._count + 1
        if self._frame is not None:
            self.dropped += 1
            self.release(self._frame)
            self._frame = None
        self._hold(len(jpeg))
        self._frame = Frame(number, NamedBytes(jpeg, f"frame {number}"), came_s)
        self._came.set()

    async def take(self) -> Frame:
        """Await a frame; whoever takes it releases it."""
        await self._came.wait()
        self._came.clear()
        frame, self._frame = self._frame, None
        assert frame is not None
        return frame

    def release(self, frame: Frame) -> None:
        """Let go of a frame's bytes."""
        self._hold(-len(frame.jpeg))

    def close(self) -> None:
        """Let go of what nobody took up."""
        if self._frame is not None:
            self.release(self._frame)
            self._frame = None


@router.websocket("/v1/live")
async def live(socket: WebSocket) -> None:
    """Judge a camera's frames until it goes."""
    await socket.accept()
    with suppress(WebSocketDisconnect, RuntimeError):  # it went while an answer was on its way
        try:
            await _serve(socket, socket.app.state.service)
        except MeiqaError as error:
            await _send(socket, _problem(socket, error))
            await socket.close(_code_of(error), error.what[:120])


async def _serve(socket: WebSocket, service: Service) -> None:
    camera_hz = await _greeting(socket, service)
    await _send(socket, _ready(service))
    newest = Newest(service.holdings.change)
    answering = asyncio.create_task(_answer_all(socket, service, newest, Viewing(camera_hz)))
    try:
        await _read_all(socket, newest)
    finally:
        answering.cancel()
        newest.close()
        await asyncio.wait({answering})


async def _greeting(socket: WebSocket, service: Service) -> float | None:
    """Let the client in; give the frame rate of its camera, if it says."""
    try:
        async with asyncio.timeout(HELLO_S):
            text = await _text(socket)
        hello = json.loads(text) if len(text) <= MOST_HELLO_CHARACTERS else None
    except (TimeoutError, ValueError, RecursionError):
        hello = None
    if not isinstance(hello, dict) or hello.get("type") != "hello":
        raise UsageError("a camera says hello first", hint='{"type": "hello", "token": null}')
    token, camera_hz = hello.get("token"), hello.get("camera_hz")
    service.authorise(token if isinstance(token, str) else None, "score")
    if isinstance(camera_hz, int | float) and 0 < camera_hz < 1000:
        return float(camera_hz)
    return None


async def _text(socket: WebSocket) -> str:
    message = await _message(socket)
    text = message.get("text")
    return text if isinstance(text, str) else ""


async def _message(socket: WebSocket) -> dict[str, Any]:
    message: dict[str, Any] = dict(await socket.receive())
    if message["type"] == "websocket.disconnect":
        raise WebSocketDisconnect(message.get("code", 1000))
    return message


async def _read_all(socket: WebSocket, newest: Newest) -> None:
    """Keep the newest frame until the camera goes."""
    while True:
        try:
            async with asyncio.timeout(IDLE_S):
                jpeg = (await _message(socket)).get("bytes")
        except TimeoutError:
            raise UsageError("no frame came for a while", hint="connect again") from None
        if not jpeg:
            raise UsageError("a frame is a JPEG in a binary message")
        if len(jpeg) > MOST_FRAME_BYTES:
            raise UploadTooLarge(
                "the frame is too large", seen=len(jpeg), allowed=f"{MOST_FRAME_BYTES} bytes"
            )
        newest.put(jpeg, clock())


async def _answer_all(
    socket: WebSocket, service: Service, newest: Newest, viewing: Viewing
) -> None:
    while True:
        frame = await newest.take()
        try:
            answer = await _answer(service, frame, viewing)
        except MeiqaError as error:
            answer = _problem(socket, error)
        except Exception as error:
            LOG.error("%s failed", frame.jpeg.name, exc_info=error)
            answer = {"type": "problem", "problem": internal_problem(_id(socket))}
        finally:
            newest.release(frame)
        with suppress(WebSocketDisconnect, RuntimeError):  # it went; whoever reads finds out
            await _send(socket, {**answer, "frame": frame.number, "dropped": newest.dropped})


async def _answer(service: Service, frame: Frame, viewing: Viewing) -> dict[str, Any]:
    """Assess a frame, in full or fast, and say what to do."""
    pixels = await asyncio.to_thread(load_pixels, frame.jpeg, max_pixels=MOST_FRAME_PIXELS)
    view = viewing.look(pixels.array, frame.came_s)
    try:
        found = await _assess(service, frame, view)
    except Overloaded as error:
        view = viewing.refused(view, 1e3 * (error.retry_after_s or 0.0))
        found = await _assess(service, frame, view)
    instruction = viewing.advise(view, found, clock())
    return {
        "type": "answer",
        "kind": view.kind,
        "stands": viewing.stands,
        "still": view.still,
        "motion": view.motion,
        "budget_ms": None if view.kind == "full" else view.budget_ms,
        "instruction": instruction.to_dict(),
        "assessment": found.to_dict(),
    }


async def _assess(service: Service, frame: Frame, view: View) -> Assessment:
    if view.kind == "full":
        return await service.desk.score(frame.jpeg)
    return await service.desk.score(
        frame.jpeg,
        budget_ms=view.budget_ms + service.settings.margin_ms,
        options=ScoreOptions(k=FAST_NEIGHBOURS),
    )


def _ready(service: Service) -> dict[str, Any]:
    package = service.desk.engines[0].package
    return {
        "type": "ready",
        "version": meiqa.__version__,
        "max_pixels": package.manifest.image.max_pixels,
        "max_frame_bytes": MOST_FRAME_BYTES,
    }


def _problem(socket: WebSocket, error: MeiqaError) -> dict[str, Any]:
    return {"type": "problem", "problem": problem_of(error, status_of(error), _id(socket))}


def _id(socket: WebSocket) -> str:
    return str(socket.scope.get("state", {}).get("request_id", ""))


def _code_of(error: MeiqaError) -> int:
    if isinstance(error, Overloaded):
        return _TRY_LATER
    return _TOO_BIG if isinstance(error, UploadTooLarge) else _POLICY


async def _send(socket: WebSocket, message: dict[str, Any]) -> None:
    await socket.send_text(json_text(message))
