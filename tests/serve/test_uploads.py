"""Uploads are bounded, and broken ones are refused: never a 500, never anything kept."""

from __future__ import annotations

import asyncio
import io
import random
import resource
import struct
import zlib
from collections.abc import AsyncIterator, Callable, Iterator

import httpx
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from meiqa.engine.engine import Engine
from meiqa.serve.access import Settings
from meiqa.serve.app import create_app
from tests.engine.samples import picture
from tests.serve.conftest import Serve, jpeg


def encoded(form: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture(3, (64, 96))).save(file, form)
    return file.getvalue()


def bomb() -> bytes:
    """A PNG of a few bytes whose header announces 60,000 × 60,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(1000))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    )


def test_too_many_bytes_are_refused_by_what_is_announced(serve: Serve) -> None:
    api = serve(Settings(max_upload_bytes=1000))
    answer = api.post("/v1/score", content=bytes(1001))
    assert answer.status_code == 413
    assert answer.json()["type"] == "urn:meiqa:problem:upload-too-large"


def test_too_many_bytes_are_refused_as_they_come(serve: Serve) -> None:
    sent = 0

    def pieces() -> Iterator[bytes]:  # without a length
        nonlocal sent
        for _ in range(100):
            sent += 1
            yield bytes(500)

    assert serve(Settings(max_upload_bytes=1000)).post("/v1/score", content=pieces()).is_error


def test_too_many_pixels_are_refused_before_they_are_decoded(api: TestClient) -> None:
    answer = api.post("/v1/score?k=2", content=bomb())
    assert answer.status_code == 413
    assert answer.json()["type"] == "urn:meiqa:problem:image-too-large"


def test_uploads_together_are_bounded(serve: Serve) -> None:
    api = serve(Settings(max_held_bytes=1000))
    answer = api.post("/v1/score", content=bytes(1001))
    assert answer.status_code == 503
    assert int(answer.headers["Retry-After"]) >= 1
    assert "meiqa_held_bytes 0.0" in api.get("/metrics").text


def test_requests_together_are_bounded_but_health_is_told(engine: Engine) -> None:
    async def check() -> None:
        app = create_app(engine, Settings(max_requests=2))
        transport = httpx.ASGITransport(app)
        release = asyncio.Event()

        async def slow() -> AsyncIterator[bytes]:
            yield b"x"
            await release.wait()

        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://localhost") as client,
        ):
            held = [asyncio.create_task(client.post("/v1/score", content=slow())) for _ in "ab"]
            await asyncio.sleep(0.2)
            refused = await client.get("/v1/model")
            health = await client.get("/healthz")
            release.set()
            answers = await asyncio.gather(*held)
        assert (refused.status_code, health.status_code) == (503, 200)
        assert refused.json()["type"] == "urn:meiqa:problem:overloaded"
        assert [answer.status_code for answer in answers] == [422, 422]

    asyncio.run(check())


def test_an_upload_that_takes_too_long_is_refused(engine: Engine) -> None:
    async def check() -> None:
        app = create_app(engine, Settings(upload_s=0.2))

        async def slow() -> AsyncIterator[bytes]:
            yield b"x"
            await asyncio.sleep(30)

        transport = httpx.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://localhost") as client,
        ):
            answer = await client.post("/v1/score", content=slow())
        assert answer.status_code == 413
        assert "too long" in answer.json()["what"]

    asyncio.run(check())


@pytest.mark.parametrize(
    ("files", "what"),
    [
        ([("photo", ("a.jpg", b"x"))], "image"),
        ([("image", ("a.jpg", b"x")), ("image", ("b.jpg", b"y"))], "image"),
        ([("image", (None, b"../etc/passwd"))], "image"),
    ],
)
def test_forms_hold_what_they_should(api: TestClient, files: object, what: str) -> None:
    answer = api.post("/v1/score", files=files)  # type: ignore[arg-type]
    assert answer.status_code == 422
    assert what in answer.json()["what"]


def test_paths_and_urls_are_only_bytes(api: TestClient) -> None:
    for text in (b"/etc/hostname", b"file:///etc/hostname", b"http://127.0.0.1:9/a.jpg"):
        assert api.post("/v1/score", content=text).json()["title"] == "Decode error"
    named = api.post("/v1/score?k=2", files={"image": ("../../etc/hostname", jpeg(1))})
    assert named.json()["path"] == "hostname"


def test_a_form_may_lie_about_itself(api: TestClient) -> None:
    for kind in (
        "multipart/form-data",
        "multipart/form-data; boundary=",
        "multipart/form-data; =;",
    ):
        answer = api.post("/v1/score", content=jpeg(1), headers={"Content-Type": kind})
        assert answer.status_code == 422, kind
    kind = "multipart/form-data; boundary=x"
    for body in (b"--x\r\n", b"--x--", b"--x\r\nA: b\r\n\r\nc\r\n--x--", b"\xff" * 99, b""):
        answer = api.post("/v1/score", content=body, headers={"Content-Type": kind})
        assert answer.status_code == 422, body


def cut(data: bytes, dice: random.Random) -> bytes:
    return data[: dice.randrange(len(data))]


def flipped(data: bytes, dice: random.Random) -> bytes:
    broken = bytearray(data)
    for _ in range(dice.randint(1, 20)):
        broken[dice.randrange(len(broken))] = dice.randrange(256)
    return bytes(broken)


def doubled(data: bytes, dice: random.Random) -> bytes:
    at = dice.randrange(len(data))
    return data[:at] + data[at // 2 :]


BREAKS: tuple[Callable[[bytes, random.Random], bytes], ...] = (cut, flipped, doubled)


def test_broken_photos_never_break_the_service(api: TestClient) -> None:
    dice = random.Random(8)
    photos = [encoded(form) for form in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM")]

    def send(count: int) -> None:
        for number in range(count):
            broken = dice.choice(BREAKS)(photos[number % len(photos)], dice)
            if number % 2:
                answer = api.post("/v1/score?k=0", content=broken)
            else:
                answer = api.post("/v1/score?k=0", files={"image": ("x", broken)})
            assert answer.status_code in (200, 413, 422), answer.text

    send(30)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    send(90)
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown_kib < 64 << 10
    assert "meiqa_held_bytes 0.0" in api.get("/metrics").text
