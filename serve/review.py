"""The page on which somebody goes through a cull, and what it asks for.

It is for one person at this machine: every address begins with a token that is new with each start,
and photos are asked for by their numbers, never by paths.
"""

from __future__ import annotations

import hmac
import io
import json
import os
import socket
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn
from cachetools import LRUCache, cachedmethod
from numpy.typing import NDArray
from PIL import Image
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from meiqa.decisions import Decisions
from meiqa.engine.files import opened
from meiqa.engine.images import DEFAULT_MAX_PIXELS, load_pixels
from meiqa.errors import AccessDenied, MeiqaError, UsageError, one_line
from meiqa.serve.access import refuse_other_sites
from meiqa.serve.app import PAGE_HEADERS
from meiqa.serve.responses import json_response, problem_response
from meiqa.types import CulledPhoto, Culling
from meiqa.wayout import Verdict, common_folder, stars_given, verdicts_of

SIDES = (480, 1280)
"""Longest sides of the small pictures, in pixels."""
_SMALL = {"quality": 82}
_CROP = {"quality": 92, "subsampling": 0}  # what is looked at there is what the photo has
_SMALL_BYTES, _PIXEL_BYTES = 128 << 20, 768 << 20
_CROP_PIXELS = 36 << 20
"""Most pixels of a part: those of a 5K screen, and as much again beyond it as the page asks for."""
_MOST_PANES = 9
_JPEG_MAGIC = b"\xff\xd8\xff"
_AT_ONCE = 2
_LEAVE_S = 5
_IMAGE_HEADERS = {"Cache-Control": "private, max-age=86400, immutable"}
_PAGE = Path(__file__).parent / "review_page"


class Pictures:
    """Photos as JPEG, small or in part, made when they are asked for; the latest are kept.

    Raises:
        ImageError: of every call, a photo cannot be read any more.
        UsageError: of `crop`, there is no such part, or it is too large.
    """

    def __init__(self, photos: Sequence[str]) -> None:
        self._photos = photos
        self._small: LRUCache[Any, bytes] = LRUCache(_SMALL_BYTES, len)
        self._whole: LRUCache[Any, NDArray[Any]] = LRUCache(_PIXEL_BYTES, lambda each: each.nbytes)
        self._lock = threading.Lock()
        self._decoding = threading.BoundedSemaphore(_AT_ONCE)

    @cachedmethod(lambda self: self._small, lock=lambda self: self._lock)
    def small(self, number: int, side: int) -> bytes:
        """Give a whole photo whose longest side has so many pixels, if it has as many."""
        with self._decoding:
            image = Image.fromarray(_pixels_for(self._photos[number], side))
        image.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=2.0)
        return _jpeg(image, _SMALL)

    @cachedmethod(lambda self: self._whole, lock=lambda self: self._lock)
    def pixels(self, number: int) -> NDArray[Any]:
        """Give a photo (H, W, 3)."""
        with self._decoding:
            return load_pixels(self._photos[number]).array

    def measure(self, number: int) -> dict[str, int]:
        """Give a photo's size, as how many panes such photos fit into memory, and a part's size."""
        pixels = self.pixels(number)
        height, width = pixels.shape[:2]
        panes = min(_MOST_PANES, max(1, _PIXEL_BYTES // pixels.nbytes))
        return {"width": width, "height": height, "panes": panes, "most": _CROP_PIXELS}

    def crop(self, number: int, left: int, top: int, width: int, height: int) -> bytes:
        """Give a part of a photo, pixel by pixel."""
        part = self.pixels(number)[top : top + height, left : left + width]
        if not part.size or part.shape[0] * part.shape[1] > _CROP_PIXELS:
            seen = f"{part.shape[1]} x {part.shape[0]} pixels"
            raise UsageError("no such part can be shown", seen=seen)
        return _jpeg(Image.fromarray(part), _CROP)


def _pixels_for(photo: str, side: int) -> NDArray[Any]:
    """Decode a photo, a JPEG only as large as it is needed: that takes a fraction of the time.

    Raises:
        ImageError: it cannot be read.
    """
    # Other formats, too large photos, and damaged ones of which something can be read (Pillow
    # raises nearly anything then) are left to what follows.
    with suppress(Exception), open(photo, "rb") as file:
        if file.peek().startswith(_JPEG_MAGIC):
            image = opened(file, photo)
            if image.width * image.height <= DEFAULT_MAX_PIXELS:
                image.draft("RGB", (side, side))
                return load_pixels(image).array
    return load_pixels(photo).array


def _jpeg(image: Image.Image, settings: Mapping[str, int]) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", **settings)
    return file.getvalue()


class Review:
    """A cull that somebody goes through.

    Args:
        found: photos in groups; what the engine would keep is what the page proposes.
        decisions: what somebody decided, before this start, too.
        stars: the scores from which on there are two to five: see `stars_given`.
        finish: does with photos what was asked for, and gives lines that tell of it.
        told: what that will be, in words.
    """

    def __init__(
        self,
        found: Culling,
        decisions: Decisions,
        stars: Sequence[float] | float,
        finish: Callable[[list[Verdict]], list[str]],
        told: Mapping[str, Any],
    ) -> None:
        self.photos = [photo for group in found.groups for photo in group]
        self.failed: Exception | None = None
        self.on_end: Callable[[], None] = lambda: None
        self._found, self._decisions = found, decisions
        self._stars = stars_given(stars, (photo.score for photo in self.photos))
        self._proposed = {each.path: each for each in verdicts_of(found, stars)}
        self._finish, self._told = finish, told
        self._lock, self._lines = threading.Lock(), list[str]()  # lines: once it is finished
        self._paths = [os.path.abspath(photo.path) for photo in self.photos]
        self._folder = common_folder(self._paths)

    def state(self) -> dict[str, Any]:
        """Give everything that the page shows but the pictures, as JSON takes it."""
        numbered = iter(enumerate(self.photos))
        with self._lock:
            groups = [
                {
                    "kind": group[0].kind,
                    "reason": group[0].reason,
                    "photos": [self._entry(*next(numbered)) for _ in group],
                }
                for group in self._found.groups
            ]
        return {"groups": groups, "failures": len(self._found.failures), **self._told}

    def _entry(self, number: int, photo: CulledPhoto) -> dict[str, Any]:
        return {
            "number": number,
            "name": one_line(os.path.relpath(self._paths[number], self._folder)),
            "score": round(photo.score, 2),
            "std": round(photo.std, 2),
            "stars": self._stars(photo.score),
            "proposed": self._proposed[photo.path].rating,
            "rating": self._decisions.ratings.get(self._paths[number]),
            "close": photo.too_close,
        }

    def give(self, ratings: Mapping[int, int]) -> dict[str, int | None]:
        """Decide about photos by their numbers, and give what stands of them then.

        Raises:
            UsageError: it is finished.
        """
        paths = {self._paths[number]: rating for number, rating in ratings.items()}
        with self._lock:
            self._require_open()
            self._decisions.give(paths)
            return self._standing({*paths})

    def undo(self) -> dict[str, int | None]:
        """Take the last decision about photos of the page back, and give what stands of them then.

        Raises:
            UsageError: it is finished.
        """
        with self._lock:
            self._require_open()
            return self._standing(self._decisions.undo({*self._paths}))

    def _require_open(self) -> None:
        if self._lines:
            raise UsageError("this review is finished", hint="start the same command again")

    def _standing(self, paths: set[str]) -> dict[str, int | None]:
        ratings = self._decisions.ratings
        return {str(n): ratings.get(each) for n, each in enumerate(self._paths) if each in paths}

    def verdicts(self) -> list[Verdict]:
        """Give what was decided, or else was proposed, of every photo."""
        verdicts = []
        for photo, path in zip(self.photos, self._paths, strict=True):
            verdict = self._proposed[photo.path]
            if (rating := self._decisions.ratings.get(path)) is not None:
                verdict = Verdict.of_cull(photo.path, rating)
            verdicts.append(verdict)
        return verdicts

    def finish(self) -> dict[str, Any]:
        """Do what was asked for, once, and end; an error is told, and kept for who runs this."""
        with self._lock:
            if not self._lines:
                try:
                    self._lines = self._finish(self.verdicts())
                except Exception as error:  # of any kind: the command reports it
                    self.failed, self._lines = error, [f"error: {error}"]
            self.on_end()
            return {"lines": self._lines, "failed": self.failed is not None}


def create_app(review: Review, pictures: Pictures, token: str) -> Starlette:
    """Make the page's service; all its addresses begin with the token."""
    at_most = len(review.photos)

    def number_of(request: Request) -> int:
        number: int = request.path_params["number"]
        if number >= at_most:
            raise HTTPException(404)
        return number

    async def give(request: Request) -> Response:
        ratings = _ratings(await request.body(), at_most)
        return json_response(await run_in_threadpool(review.give, ratings))

    def size(request: Request) -> Response:
        return json_response(pictures.measure(number_of(request)))

    def small(request: Request) -> Response:
        side = request.path_params["side"]
        if side not in SIDES:
            raise HTTPException(404)
        return _image(pictures.small(number_of(request), side))

    def crop(request: Request) -> Response:
        box = (request.path_params[name] for name in ("left", "top", "width", "height"))
        return _image(pictures.crop(number_of(request), *box))

    photo = "/photos/{number:int}"
    routes = [
        Route("/state", lambda _: json_response(review.state())),
        Route("/ratings", give, methods=["POST"]),
        Route("/undo", lambda _: json_response(review.undo()), methods=["POST"]),
        Route("/finish", lambda _: json_response(review.finish()), methods=["POST"]),
        Route(f"{photo}/size", size),
        Route(f"{photo}/{{side:int}}.jpg", small),
        Route(f"{photo}/{{left:int}}-{{top:int}}-{{width:int}}-{{height:int}}.jpg", crop),
        # What both pages have in common lies with the camera's.
        Mount("/", StaticFiles(directory=_PAGE, packages=[("meiqa.serve", "page")], html=True)),
    ]
    return Starlette(
        routes=[Mount("/{token}", routes=routes)],
        middleware=[Middleware(BaseHTTPMiddleware, dispatch=partial(_guard, token=token))],
        exception_handlers={MeiqaError: _refused},
    )


def _ratings(body: bytes, at_most: int) -> dict[int, int]:
    """Read what is to be decided: {"number": rating, …}."""
    try:
        given = json.loads(body)
        ratings = {int(number): rating for number, rating in given.items()}
    except (ValueError, AttributeError):
        ratings = {}
    sound = (n in range(at_most) and type(r) is int and -1 <= r <= 5 for n, r in ratings.items())
    if not ratings or not all(sound):
        raise UsageError("no such decision", allowed="photos by number, each from -1 to 5")
    return ratings


def _image(jpeg: bytes) -> Response:
    return Response(jpeg, media_type="image/jpeg", headers=_IMAGE_HEADERS)


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, MeiqaError)
    return problem_response(error, uuid.uuid4().hex)


async def _guard(request: Request, call_next: RequestResponseEndpoint, token: str) -> Response:
    """Let in who has the token, from this machine and from no other site's page."""
    try:
        refuse_other_sites(request.headers.get("host"), request.headers.get("origin"))
        given = request.scope["path"].removeprefix("/").partition("/")[0]  # "*", too, is a path
        if not hmac.compare_digest(given.encode(), token.encode()):
            raise AccessDenied("this address lacks the token", hint="the terminal shows it whole")
        response = await call_next(request)
    except AccessDenied as error:
        response = await _refused(request, error)
    for name, value in PAGE_HEADERS.items():
        response.headers.setdefault(name, value)
    return response


def run(review: Review, pictures: Pictures, token: str, opened: socket.socket) -> None:
    """Serve until the review is finished; a signal ends it, too, and is then as without this.

    Raises:
        MeiqaError: finishing failed.
    """
    config = uvicorn.Config(
        create_app(review, pictures, token),
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        lifespan="off",
        timeout_graceful_shutdown=_LEAVE_S,
    )
    server = uvicorn.Server(config)

    def end() -> None:
        server.should_exit = True

    review.on_end = end
    server.run(sockets=[opened])
    if review.failed is not None:
        raise review.failed
