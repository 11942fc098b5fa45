"""Requests' bodies: read within limits of bytes, time and number, never from a path or a URL."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from meiqa.engine.images import NamedBytes
from meiqa.errors import Overloaded, UploadTooLarge, UsageError
from meiqa.serve.metrics import Metrics
from meiqa.serve.settings import Settings

__all__ = ["Holdings", "Upload", "read_photo", "read_upload"]

_NAME_CHARACTERS = 255
_FIELD_BYTES = 4096


@dataclass(frozen=True)
class Upload:
    """A form: its photos by field, in the order they came, and its words.

    What a photo is called is never taken for a path.
    """

    photos: dict[str, list[NamedBytes]]
    words: dict[str, str]


class Holdings:
    """Bytes of uploads that are held at once; used on the event loop only."""

    def __init__(self, limit: int, metrics: Metrics) -> None:
        self._limit = limit
        self._held = 0
        self._metrics = metrics

    @contextmanager
    def holding(self) -> Iterator[Holding]:
        """Hold bytes until the end of the block."""
        holding = Holding(self)
        try:
            yield holding
        finally:
            self.change(-holding.held)

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
        self._metrics.held_bytes.set(self._held)


@dataclass
class Holding:
    """What one request holds."""

    holdings: Holdings
    held: int = 0

    def add(self, count: int) -> None:
        """Hold more; errors are those of `Holdings.change`."""
        self.holdings.change(count)
        self.held += count


class _InMemory(MultiPartParser):
    """Keeps files in memory: how many bytes there are is bounded already."""

    spool_max_size = 1 << 40


async def read_photo(
    request: Request, holding: Holding, settings: Settings, beside: str | None = None
) -> tuple[NamedBytes, NamedBytes | None]:
    """Read one photo: the whole body, or the field `image` of a form.

    Args:
        beside: the form may hold another photo in this field.

    Raises:
        UsageError, UploadTooLarge, Overloaded: the body is not accepted.
    """
    if _media_type(request) != "multipart/form-data":
        data = bytearray()
        async for chunk in _bounded(request, holding, settings):
            data += chunk
        return NamedBytes(data, "image"), None
    optional = () if beside is None else (beside,)
    photos = (await read_upload(request, holding, settings, {"image": 1}, optional)).photos
    return photos["image"][0], next((photos[name][0] for name in optional if name in photos), None)


async def read_upload(
    request: Request,
    holding: Holding,
    settings: Settings,
    fields: dict[str, int],
    optional: Collection[str] = (),
) -> Upload:
    """Read a form of photos.

    Args:
        fields: names of its files, and how many of each there may be; one at least.
        optional: names of files that there may be one of.

    Raises:
        UsageError, UploadTooLarge, Overloaded: the body is not accepted.
    """
    if _media_type(request) != "multipart/form-data":
        raise UsageError(
            "the photos come in a form",
            seen=one_word(request.headers.get("content-type")),
            allowed="multipart/form-data",
        )
    parser = _InMemory(
        request.headers,
        _bounded(request, holding, settings),
        max_files=sum(fields.values()) + len(optional),
        max_fields=16,
        max_part_size=_FIELD_BYTES,
    )
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise UsageError(f"the form cannot be read: {error.message}") from None
    photos: dict[str, list[NamedBytes]] = {}
    words: dict[str, str] = {}
    try:
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                photo = NamedBytes(await value.read(), _plain(value.filename))
                photos.setdefault(name, []).append(photo)
            else:
                words[name] = value
    finally:
        await form.close()
    least = {**dict.fromkeys(fields, 1), **dict.fromkeys(optional, 0)}
    for name, most in {**fields, **dict.fromkeys(optional, 1)}.items():
        count = len(photos.get(name, []))
        if not least[name] <= count <= most:
            raise UsageError(
                f"the form's field {name} holds the photo" + ("s" if most > 1 else ""),
                seen=f"{count} files",
                allowed="1 file" if most == 1 else f"1 to {most} files",
            )
    return Upload(photos, words)


async def _bounded(
    request: Request, holding: Holding, settings: Settings
) -> AsyncGenerator[bytes, None]:
    """Give the body in pieces; refuse it as soon as it is too much, or takes too long."""
    announced = request.headers.get("content-length", "")
    if announced.isascii() and announced.isdigit() and int(announced) > settings.max_upload_bytes:
        raise _too_large(settings)
    stream = request.stream()
    try:
        async with asyncio.timeout(settings.upload_s):
            async for chunk in stream:
                holding.add(len(chunk))
                if holding.held > settings.max_upload_bytes:
                    raise _too_large(settings)
                yield chunk
    except TimeoutError:
        raise UploadTooLarge(
            "the upload took too long", allowed=f"{settings.upload_s:g} s", hint="send it again"
        ) from None


def _too_large(settings: Settings) -> UploadTooLarge:
    return UploadTooLarge(
        "the request is too large",
        allowed=f"{settings.max_upload_bytes} bytes",
        hint="scale the photo down, or send fewer",
    )


def _media_type(request: Request) -> str:
    return request.headers.get("content-type", "").split(";")[0].strip().lower()


def one_word(text: str | None) -> str:
    """Shorten what a client sent to what a message bears."""
    return "nothing" if not text else text[:64]


def _plain(filename: str | None) -> str:
    """Keep the last part of a file's name, for the answer to name the photo by."""
    name = (filename or "").replace("\\", "/").rsplit("/", 1)[-1]
    shown = "".join(char if char.isprintable() else "?" for char in name)
    return shown[:_NAME_CHARACTERS] or "image"
