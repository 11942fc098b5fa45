"""Services over the tiny random model, and over an engine that only takes time."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from meiqa.engine.engine import Engine
from meiqa.engine.package import EnginePackage
from meiqa.serve.access import Keys, Settings, add_key
from meiqa.serve.app import create_app
from tests.engine.samples import picture

Serve = Callable[..., TestClient]
Started = Callable[..., tuple[subprocess.Popen[str], str]]


def jpeg(seed: int, size: tuple[int, int] = (160, 224)) -> bytes:
    """A photo as it is uploaded."""
    file = io.BytesIO()
    Image.fromarray(picture(seed, size)).save(file, "JPEG", quality=95)
    return file.getvalue()


@pytest.fixture(scope="session")
def engine(package: EnginePackage, anchors: Path) -> Iterator[Engine]:
    """Give an engine that cannot learn."""
    with Engine.open(package.path, anchors, threads=1, learn=False) as engine:
        yield engine


@pytest.fixture(scope="session")
def api(engine: Engine) -> Iterator[TestClient]:
    """Give a service without keys."""
    app = create_app(engine, Settings(budget_ms=30_000))
    with TestClient(app, base_url="http://localhost") as client:
        yield client


@pytest.fixture
def serve(engine: Engine) -> Iterator[Serve]:
    """Give a function that opens services with settings of their own."""
    with ExitStack() as stack:

        def opened(settings: Settings, served: Engine = engine) -> TestClient:
            app = create_app(served, settings)
            return stack.enter_context(TestClient(app, base_url="http://localhost"))

        yield opened


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Keys, str, str]:
    """Give a key file's content, a key that may score, and one that may write, too."""
    file = tmp_path / "keys"
    reader = add_key(file, "reader", ["score"])
    writer = add_key(file, "writer", ["score", "memory:write"])
    return Keys.read(file), reader, writer


@pytest.fixture
def started(package: EnginePackage, anchors: Path) -> Iterator[Started]:
    """Give a function that starts services."""
    running: list[subprocess.Popen[str]] = []

    def start(*options: str) -> tuple[subprocess.Popen[str], str]:
        command = [sys.executable, "-m", "meiqa", "serve", "--port", "0", "--threads", "1"]
        places = ["--package", str(package.path), "--memory", str(anchors), *options]
        process = subprocess.Popen([*command, *places], stderr=subprocess.PIPE, text=True)
        running.append(process)
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if found := re.search(r"serving on (http://\S+:\d+)", line):
                wait_until_ready(found[1])
                return process, found[1]
        raise AssertionError("".join(said))

    yield start
    for process in running:
        with suppress(ProcessLookupError):
            process.kill()
        process.communicate()


def wait_until_ready(url: str) -> None:
    """Wait for a service to answer."""
    for _ in range(600):
        with suppress(httpx.HTTPError):
            httpx.get(f"{url}/readyz").raise_for_status()
            return
        time.sleep(0.1)
    raise AssertionError("the service did not become ready")
