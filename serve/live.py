"""`/v1/live`: frames of a camera come in over a WebSocket, and answers go out.

The client says hello, with its key if the service has keys, and then sends frames, each a JPEG in a
binary message. Only the newest frame is kept while one is assessed: older ones are dropped, and
counted. Each frame that is taken up gets one answer, a JSON object with its number. Who says so
with its hello may ask for the best frame of the last seconds: only then are frames kept. What the
model sees of those that the next ones are compared with is held for all, and counted.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from contextlib import suppress
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
from fastapi import APIRouter
from numpy.typing import NDArray
from starlette.websockets import WebSocket, WebSocketDisconnect

import meiqa
from meiqa.engine.engine import Engine
from meiqa.engine.images import NamedBytes, load_pixels
from meiqa.engine.sets import Candidate
from meiqa.errors import MeiqaError, Overloaded, UploadTooLarge, UsageError
from meiqa.formats import json_text
from meiqa.serve.access import authorise
from meiqa.serve.camera import BEST_S, KEPT_S, CameraSession, FramePlan
from meiqa.serve.guidance import Change
from meiqa.serve.responses import problem_of, unforeseen
from meiqa.serve.routes import Service
from meiqa.types import Assessment, Budget, ShotComparison

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
        self._keeps_best = False
        self._newest: asyncio.Queue[Frame] = asyncio.Queue(1)
        self._count = self._dropped = self._kept_bytes = 0
        self._sending = asyncio.Lock()
        self.id = str(socket.scope.get("state", {}).get("request_id", ""))

    async def send(self, message: dict[str, Any], jpeg: bytes | None = None) -> None:
        """Send a JSON object, and maybe a JPEG right behind it."""
        async with self._sending:
            await self._socket.send_text(json_text(message))
            if jpeg is not None:
                await self._socket.send_bytes(jpeg)

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
        self._keeps_best = hello.get("best") is True
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
                await self._take(await self._within_idle())
        finally:
            answering.cancel()
            self._drop()
            self._hold(0)  # before the wait, which may be cancelled
            await asyncio.wait({answering})

    async def _message(self) -> dict[str, Any]:
        message: dict[str, Any] = dict(await self._socket.receive())
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code", 1000))
        return message

    async def _within_idle(self) -> dict[str, Any]:
        try:
            async with asyncio.timeout(IDLE_S):
                return await self._message()
        except TimeoutError:
            raise UsageError("no frame came for a while", hint="connect again") from None

    async def _take(self, message: dict[str, Any]) -> None:
        """Keep a frame until it is taken up, or give the best of those that were."""
        if text := message.get("text"):
            await self._give_best(_window_of(text))
            return
        jpeg: bytes = message.get("bytes") or b""
        if not jpeg:
            raise UsageError("a frame is a JPEG in a binary message")
        if len(jpeg) > MOST_FRAME_BYTES:
            allowed = f"{MOST_FRAME_BYTES} bytes"
            raise UploadTooLarge("the frame is too large", seen=len(jpeg), allowed=allowed)
        self._keep(jpeg)

    async def _give_best(self, seconds: float) -> None:
        """Send the best frame of the last seconds, and what came of it."""
        if not self._keeps_best:
            hint = '{"type": "hello", "best": true}'
            raise UsageError("frames are kept for who says so with its hello", hint=hint)
        now_s = clock()
        best = self._session.scenes.best(seconds, now_s)
        if best is None:
            error = UsageError("no frame of this window is kept", seen=f"{seconds:g} s")
            await self.send({"type": "problem", "problem": problem_of(error, self.id)})
            return
        message = {
            "type": "best",
            "age_s": round(now_s - best.at_s, 3),
            "level": best.level,
            "bytes": len(best.jpeg),
            "assessment": best.found.to_dict(),
        }
        await self.send(message, best.jpeg)

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
        scored_s = clock()
        change = await self._compare(frame, plan, pixels.array, found)
        instruction = self._session.advise(plan, found, scored_s, change)
        return {
            "type": "answer",
            "kind": plan.kind,
            "stands": self._session.stands,
            "still": plan.still,
            "motion": plan.motion,
            "budget_ms": plan.budget_ms,
            "instruction": asdict(instruction),
            "change": change and asdict(change),
            "assessment": found.to_dict(),
        }

    async def _compare(
        self, frame: Frame, plan: FramePlan, pixels: NDArray[np.uint8], found: Assessment
    ) -> Change | None:
        """Say how a frame looks beside the best of its scene; None if there was no time for it."""

        def compared(engine: Engine, _: Budget) -> tuple[Candidate, ShotComparison | None]:
            shot, rival = engine.read_shot(pixels), plan.rival
            return shot, None if rival is None else engine.compare_shots(shot, rival.shot)

        try:
            shot, against = await self._service.scheduler.run(compared)
        except Overloaded:
            return None
        scenes = self._session.scenes
        kept = frame.jpeg if self._keeps_best else b""
        change = scenes.take(plan, found, shot, against, kept)
        try:
            self._hold(scenes.kept_bytes)
        except Overloaded:
            scenes.forget()
            self._hold(0)
        return change

    def _hold(self, kept_bytes: int) -> None:
        """Hold as many bytes as are kept, of all that may be held.

        Raises:
            Overloaded: they are too many.
        """
        self._service.uploads.change(kept_bytes - self._kept_bytes)
        self._kept_bytes = kept_bytes

    async def _score(self, frame: Frame, plan: FramePlan) -> Assessment:
        budget_ms = plan.budget_ms and plan.budget_ms + self._service.settings.margin_ms
        return await self._service.scheduler.score(frame.jpeg, budget_ms=budget_ms, k=plan.k)


def _window_of(text: str) -> float:
    """Read the seconds of a request for the best frame.

    Raises:
        UsageError: it is none.
    """
    try:
        asked = json.loads(text) if len(text) <= MOST_HELLO_CHARACTERS else None
    except (ValueError, RecursionError):
        asked = None
    seconds: object = None
    if isinstance(asked, dict) and asked.get("type") == "best":
        seconds = asked.get("seconds", BEST_S)
    if (
        not isinstance(seconds, int | float)
        or isinstance(seconds, bool)
        or not 0 < seconds <= KEPT_S
    ):
        raise UsageError(
            "a camera sends frames, or asks for the best of them",
            allowed=f'{{"type": "best", "seconds": {BEST_S:g}}}, of up to {KEPT_S:g}',
        )
    return float(seconds)
