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
from contextlib import suppress
from dataclasses import asdict
from typing import Any, NamedTuple

from fastapi import APIRouter
from starlette.websockets import WebSocket, WebSocketDisconnect

import meiqa
from meiqa.engine.images import NamedBytes, load_pixels
from meiqa.errors import MeiqaError, Overloaded, UploadTooLarge, UsageError
from meiqa.formats import json_text
from meiqa.serve.access import authorise
from meiqa.serve.camera import CameraSession, FramePlan
from meiqa.serve.responses import problem_of, unforeseen
from meiqa.serve.routes import Service
from meiqa.types import Assessment

LOG = logging.getLogger(__name__)
clock = time.monotonic
router = APIRouter()
MOST_FRAME_BYTES = 4 << 20
MOST_FRAME_PIXELS = 9_000_000
MOST_HELLO_CHARACTERS = 4096
HELLO_S = 10.0
IDLE_S = 120.0
"""A camera from which nothing comes for so long is taken to be gone."""
_POLICY = 1008
_CODES = {UploadTooLarge: 1009, Overloaded: 1013}


class Frame(NamedTuple):
    """A frame of the camera; numbers count from 0 in the order in which they came."""

    number: int
    jpeg: NamedBytes
    came_s: float


@router.websocket("/v1/live")
async def live(socket: WebSocket) -> None:
    """Judge a camera's frames until it goes."""
    await socket.accept()
    camera = LiveCamera(socket)
    with suppress(WebSocketDisconnect, RuntimeError):  # it went while an answer was on its way
        try:
            await camera.greet()
            await camera.run()
        except MeiqaError as error:
            await camera.send({"type": "problem", "problem": problem_of(error, camera.id)})
            code = next((_CODES[kind] for kind in _CODES if isinstance(error, kind)), _POLICY)
            await socket.close(code, error.what[:120])


class LiveCamera:
    """One connection: its newest frame waits here until it is taken up."""

    def __init__(self, socket: WebSocket) -> None:
        self._socket = socket
        self._service: Service = socket.app.state.service
        self._manifest = self._service.scheduler.engines[0].package.manifest
        self._session: CameraSession  # once it has said hello
        self._newest: asyncio.Queue[Frame] = asyncio.Queue(1)
        self._count = self._dropped = 0
        self.id = str(socket.scope.get("state", {}).get("request_id", ""))

    async def send(self, message: dict[str, Any]) -> None:
        """Send a JSON object."""
        await self._socket.send_text(json_text(message))

    async def greet(self) -> None:
        """Let the client in, and tell it what it may send.

        Raises:
            UsageError: it does not say hello.
            AccessDenied: it may not ask.
        """
        try:
            async with asyncio.timeout(HELLO_S):
                text = (await self._message()).get("text") or ""
            hello = json.loads(text) if len(text) <= MOST_HELLO_CHARACTERS else None
        except (TimeoutError, ValueError, RecursionError):
            hello = None
        if not isinstance(hello, dict) or hello.get("type") != "hello":
            raise UsageError("a camera says hello first", hint='{"type": "hello", "token": null}')
        token, camera_hz = hello.get("token"), hello.get("camera_hz")
        keys = self._service.settings.keys
        authorise(keys, token if isinstance(token, str) else None, "score")
        if not isinstance(camera_hz, int | float) or not 0 < camera_hz < 1000:
            camera_hz = None
        neighbours = self._manifest.calibration.neighbours
        self._session = CameraSession(camera_hz, neighbours=neighbours)
        await self.send(
            {
                "type": "ready",
                "version": meiqa.__version__,
                "max_pixels": self._manifest.image.max_pixels,
                "max_frame_bytes": MOST_FRAME_BYTES,
            }
        )

    async def run(self) -> None:
        """Read frames, and answer meanwhile, until the camera goes.

        Raises:
            UsageError, UploadTooLarge, Overloaded: what it sends is not accepted.
        """
        answering = asyncio.create_task(self._answer_all())
        try:
            while True:
                self._keep(await self._jpeg())
        finally:
            answering.cancel()
            self._drop()
            await asyncio.wait({answering})

    async def _message(self) -> dict[str, Any]:
        message: dict[str, Any] = dict(await self._socket.receive())
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code", 1000))
        return message

    async def _jpeg(self) -> bytes:
        try:
            async with asyncio.timeout(IDLE_S):
                jpeg: bytes = (await self._message()).get("bytes") or b""
        except TimeoutError:
            raise UsageError("no frame came for a while", hint="connect again") from None
        if not jpeg:
            raise UsageError("a frame is a JPEG in a binary message")
        if len(jpeg) > MOST_FRAME_BYTES:
            allowed = f"{MOST_FRAME_BYTES} bytes"
            raise UploadTooLarge("the frame is too large", seen=len(jpeg), allowed=allowed)
        return jpeg

    def _keep(self, jpeg: bytes) -> None:
        """Keep a frame in place of the one before."""
        number, self._count = self._count, self._count + 1
        self._dropped += self._drop()
        self._service.uploads.change(len(jpeg))
        self._newest.put_nowait(Frame(number, NamedBytes(jpeg, f"frame {number}"), clock()))

    def _drop(self) -> bool:
        """Let go of the frame that nobody took up, if there is one."""
        if self._newest.empty():
            return False
        self._service.uploads.change(-len(self._newest.get_nowait().jpeg))
        return True

    async def _answer_all(self) -> None:
        while True:
            frame = await self._newest.get()
            try:
                answer = await self._answer(frame)
            except MeiqaError as error:
                answer = {"type": "problem", "problem": problem_of(error, self.id)}
            except Exception as error:
                LOG.error("%s failed", frame.jpeg.name, exc_info=error)
                answer = {"type": "problem", "problem": unforeseen(self.id)}
            finally:
                self._service.uploads.change(-len(frame.jpeg))
            with suppress(WebSocketDisconnect, RuntimeError):  # it went; whoever reads finds out
                await self.send({**answer, "frame": frame.number, "dropped": self._dropped})

    async def _answer(self, frame: Frame) -> dict[str, Any]:
        """Score a frame, in full or fast, and say what to do."""
        pixels = await asyncio.to_thread(load_pixels, frame.jpeg, max_pixels=MOST_FRAME_PIXELS)
        plan = self._session.plan(pixels.array, frame.came_s)
        try:
            found = await self._score(frame, plan)
        except Overloaded as error:
            plan = self._session.replan(plan, 1e3 * (error.retry_after_s or 0.0))
            found = await self._score(frame, plan)
        instruction = self._session.advise(plan, found, clock())
        return {
            "type": "answer",
            "kind": plan.kind,
            "stands": self._session.stands,
            "still": plan.still,
            "motion": plan.motion,
            "budget_ms": plan.budget_ms,
            "instruction": asdict(instruction),
            "assessment": found.to_dict(),
        }

    async def _score(self, frame: Frame, plan: FramePlan) -> Assessment:
        budget_ms = plan.budget_ms and plan.budget_ms + self._service.settings.margin_ms
        return await self._service.scheduler.score(frame.jpeg, budget_ms=budget_ms, k=plan.k)
