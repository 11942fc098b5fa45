"""Requests' bodies: read within limits of bytes, time and number, never from a path or a URL."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from fastapi import Request
from prometheus_client import Gauge
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from meiqa.engine.images import NamedBytes
from meiqa.errors import Overloaded, UploadTooLarge, UsageError
from meiqa.serve.access import Settings

Hold = Callable[[int], int]
"""Holds so many bytes more, and gives how many are held for this request, or refuses."""
_FORM = "multipart/form-data"
_NAME_CHARACTERS = 255
_FIELD_BYTES = 4096
_FILE = {"type": "string", "format": "binary"}


class UploadLimiter:
    """Bounds the bytes of uploads that are held at once; used on the event loop only."""

    def __init__(self, limit: int, gauge: Gauge) -> None:
        self._limit, self._gauge = limit, gauge
        self._held = 0

    @contextmanager
    def holding(self) -> Iterator[Hold]:
        """Give what a request holds bytes with, until the end of the block."""
        held = 0

        def hold(count: int) -> int:
            nonlocal held
            self.change(count)
            held += count
            return held

        try:
            yield hold
        finally:
            self.change(-held)

    def change(self, by: int) -> None:
        """Hold more bytes, or fewer.

        Raises:
            Overloaded: there would be too many.
        """
        if by > 0 and self._held + by > self._limit:
            error = Overloaded("too many uploads at once", hint="ask again in a second")
            error.retry_after_s = 1.0
            raise error
        self._held += by
        self._gauge.set(self._held)


class _InMemory(MultiPartParser):
    """Keeps files in memory: how many bytes there are is bounded already."""

    spool_max_size = 1 << 40


async def read_photo(
    request: Request, hold: Hold, settings: Settings, beside: Mapping[str, range] = {}
) -> tuple[NamedBytes, list[NamedBytes]]:
    """Read one photo: the whole body, or the field `image` of a form; and those beside it.

    Args:
        beside: fields of the form for other photos, and how many of each there may be.

    Raises:
        UsageError, UploadTooLarge, Overloaded: the body is not accepted.
    """
    if _media_type(request) != _FORM:
        body = bytearray()
        async for chunk in _bounded(request, hold, settings):
            body += chunk
        return NamedBytes(body, "image"), []
    photos = await read_form(request, hold, settings, {"image": range(1, 2), **beside})
    return photos["image"][0], [photo for field in beside for photo in photos.get(field, [])]


async def read_form(
    request: Request, hold: Hold, settings: Settings, fields: Mapping[str, range]
) -> dict[str, list[NamedBytes]]:
    """Read a form of photos, by field in the order they came.

    What a photo is called is never taken for a path.

    Args:
        fields: names of its files, and how many of each there may be.

    Raises:
        UsageError, UploadTooLarge, Overloaded: the body is not accepted.
    """
    if _media_type(request) != _FORM:
        raise UsageError(
            "the photos come in a form",
            seen=(request.headers.get("content-type") or "nothing")[:64],
            allowed=_FORM,
        )
    parser = _InMemory(
        request.headers,
        _bounded(request, hold, settings),
        max_files=sum(counts[-1] for counts in fields.values()),
        max_fields=16,
        max_part_size=_FIELD_BYTES,
    )
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise UsageError(f"the form cannot be read: {error.message}") from None
    photos: dict[str, list[NamedBytes]] = {}
    try:
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                photo = NamedBytes(await value.read(), _plain(value.filename))
                photos.setdefault(name, []).append(photo)
    finally:
        await form.close()
    for name, counts in fields.items():
        count, most = len(photos.get(name, [])), counts[-1]
        if count not in counts:
            raise UsageError(
                f"the form's field {name} holds the photo" + ("s" if most > 1 else ""),
                seen=f"{count} files",
                allowed="1 file" if most == 1 else f"1 to {most} files",
            )
    return photos


async def _bounded(request: Request, hold: Hold, settings: Settings) -> AsyncGenerator[bytes, None]:
    """Give the body in pieces; refuse it as soon as it is too much, or takes too long."""
    too_large = UploadTooLarge(
        "the request is too large",
        allowed=f"{settings.max_upload_bytes} bytes",
        hint="scale the photo down, or send fewer",
    )
    announced = request.headers.get("content-length", "")
    if announced.isascii() and announced.isdigit() and int(announced) > settings.max_upload_bytes:
        raise too_large
    try:
        async with asyncio.timeout(settings.upload_s):
            async for chunk in request.stream():
                if hold(len(chunk)) > settings.max_upload_bytes:
                    raise too_large
                yield chunk
    except TimeoutError:
        raise UploadTooLarge(
            "the upload took too long", allowed=f"{settings.upload_s:g} s", hint="send it again"
        ) from None


def _media_type(request: Request) -> str:
    return request.headers.get("content-type", "").split(";")[0].strip().lower()


def _plain(filename: str | None) -> str:
    """Keep the last part of a file's name, for the answer to name the photo by."""
    name = (filename or "").replace("\\", "/").rsplit("/", 1)[-1]
    shown = "".join(char if char.isprintable() else "?" for char in name)
    return shown[:_NAME_CHARACTERS] or "image"


def photo_body(beside: Mapping[str, range] = {}) -> dict[str, Any]:
    """Document a body that is a photo, or a form with one, and perhaps with others beside it."""
    form = form_body({"image": range(1, 2), **beside})
    content = {
        media_type: {"schema": _FILE} for media_type in ("image/*", "application/octet-stream")
    }
    return {"requestBody": {"required": True, "content": content | form["requestBody"]["content"]}}


def form_body(fields: Mapping[str, range]) -> dict[str, Any]:
    """Document a form of photos; see `read_form`."""
    form = {
        "type": "object",
        "properties": {
            name: _FILE
            if counts[-1] == 1
            else {"type": "array", "items": _FILE, "minItems": counts[0], "maxItems": counts[-1]}
            for name, counts in fields.items()
        },
        "required": [name for name, counts in fields.items() if 0 not in counts],
    }
    return {"requestBody": {"required": True, "content": {_FORM: {"schema": form}}}}
